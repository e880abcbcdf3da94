// One kernel as a library (launch) or as a program that reads its arguments from a file (main, for sanitizers and gcov).
//   -DSOURCE='"graph.cu"' -DFUNCTION=graph_block -DEMULATE
#include SOURCE
extern "C" int launch(int grid, int threads, int shared, int schedule, int count, void **arguments, long *barriers) {
    return emulated_launch(FUNCTION, grid, threads, shared, schedule, count, arguments, barriers);
}
#ifdef PROGRAM
// The file: grid, threads, shared bytes, schedule, count as int32; then of each argument whether it is a pointer (int32),
// its bytes (int64) and these. A pointer of no bytes is null.
template <typename T> static T get(FILE *file) { T x; if (std::fread(&x, sizeof x, 1, file) != 1) std::exit(9); return x; }
int main(int, char **argv) {
    FILE *file = std::fopen(argv[1], "rb");
    if (!file) return 9;
    int grid = get<int>(file), threads = get<int>(file), shared = get<int>(file), schedule = get<int>(file);
    int count = get<int>(file);
    std::vector<std::vector<char>> bytes(count);
    std::vector<void *> pointers(count), arguments(count);
    for (int n = 0; n < count; n++) {
        int pointer = get<int>(file);
        bytes[n].resize(get<int64_t>(file));
        if (!bytes[n].empty() && std::fread(bytes[n].data(), bytes[n].size(), 1, file) != 1) return 9;
        pointers[n] = bytes[n].empty() ? nullptr : bytes[n].data();
        arguments[n] = pointer ? &pointers[n] : pointers[n];
    }
    long barriers;
    return launch(grid, threads, shared, schedule, count, arguments.data(), &barriers);
}
#endif
