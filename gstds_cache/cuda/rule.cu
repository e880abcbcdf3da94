// The default rule on the device, one thread block a graph: signs and ties of the eigenvectors (finish_block), and the
// cells and the draw of ``cells`` and ``cells-squared`` (cells_block). What is kept equals selection/strata.py's rows for
// the same spectra, to the last bit: every sum runs in NumPy's order, and a product that is added to something is rounded
// first (PRODUCT), as no compiler may then contract the two.
//
// Invariants:
//   C1  A level of the halving cuts all of its cells at once; strata.halve goes cell by cell, and no cell looks at another.
//       Node n of level l covers the final cells a .. b - 1 that span() finds; where a node is one final cell it stays the
//       left child, and its right child does not exist.
//   C2  ``order`` and ``next`` hold row numbers below B at all times: a NaN costs sense, never a store out of bounds.
//   C3  Row i of a node goes to the place of its rank by (coordinate, row number): a stable sort of ascending rows.
#include "block.cuh"

#define SIGN_TIE 1e-6       // spectral/result.py
#define TIE 1e-6            // selection/rule.py
#define FLOOR 0.05          // selection/spread.py
#define SMALLEST 2.2250738585072014e-308
#define PAIRWISE 128        // numbers that NumPy adds in eight lanes, before it halves

#ifdef EMULATE
#define PRODUCT(a, b) ((a) * (b))
typedef unsigned long long uint64;
static inline uint64 __umul64hi(uint64 a, uint64 b) { return (uint64)(((unsigned __int128)a * b) >> 64); }
#else
#define PRODUCT(a, b) __dmul_rn(a, b)
typedef unsigned long long uint64;
#endif

// ---- signs and ties -------------------------------------------------------------------------------------------------
extern "C" __global__ void finish_block(int B, int Q, double *__restrict__ basis)  // [G][Q][B], in place
{
    SHARED_MEMORY(memory);
    double *largest = (double *)memory;                // [Q][CHUNKS]
    int *first = (int *)(largest + Q * CHUNKS);        // [Q][CHUNKS]
    basis += (long long)blockIdx.x * Q * B;
    EACH(t, Q * CHUNKS) {
        const double *v = basis + t / CHUNKS * B;
        double most = 0;
        for (int i = t % CHUNKS; i < B; i += CHUNKS) most = fmax(most, fabs(v[i]));
        largest[t] = most;
    }
    SYNC();
    EACH(q, Q) {
        double most = 0;
        for (int c = 0; c < CHUNKS; c++) most = fmax(most, largest[q * CHUNKS + c]);
        largest[q * CHUNKS] = most;
    }
    SYNC();
    EACH(t, Q * CHUNKS) {  // the first row within SIGN_TIE of the largest
        const double *v = basis + t / CHUNKS * B;
        double enough = PRODUCT(1 - SIGN_TIE, largest[t / CHUNKS * CHUNKS]);
        int i = t % CHUNKS;
        while (i < B && !(fabs(v[i]) >= enough)) i += CHUNKS;
        first[t] = i;
    }
    SYNC();
    EACH(q, Q) {
        int lowest = B;
        for (int c = 0; c < CHUNKS; c++) lowest = first[q * CHUNKS + c] < lowest ? first[q * CHUNKS + c] : lowest;
        first[q * CHUNKS] = lowest < B && basis[q * B + lowest] < 0;  // whether to turn it over
    }
    SYNC();
    EACH(t, Q * B) {
        int q = t / B;
        double step = PRODUCT(TIE, largest[q * CHUNKS]), v = first[q * CHUNKS] ? -basis[t] : basis[t];
        step = step > 0 ? step : 1.0;
        basis[t] = PRODUCT(rint(v / step), step);
    }
}

extern "C" __host__ __device__ int finish_bytes(int Q) { return Q * CHUNKS * 12; }

// ---- cells ----------------------------------------------------------------------------------------------------------
struct Span { int a, b; };

__device__ __forceinline__ Span span(int node, int level, int cells) {  // b == a: there is no such node (C1)
    int a = 0, b = cells;
    for (int bit = level - 1; bit >= 0; bit--) {
        int right = node >> bit & 1;
        if (b - a > 1) { int middle = a + (b - a) / 2; if (right) a = middle; else b = middle; }
        else if (right) return {a, a};
    }
    return {a, b};
}

// NumPy's sum of at least 8 float64 in memory order: pairwise above 128 numbers, eight lanes below.
__device__ double numpy_sum_of_few(const double *x, int n) {
    double r[8];
    for (int l = 0; l < 8; l++) r[l] = x[l];
    int i = 8;
    for (; i < n - n % 8; i += 8) for (int l = 0; l < 8; l++) r[l] += x[i + l];
    double s = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
    for (; i < n; i++) s += x[i];
    return s;
}

// By one thread. The halves are walked depth first; of each one that waits: its first number, its length, and the sum of
// its left half where that is known.
__device__ double numpy_sum(const double *x, int n) {
    int begin[16], length[16], state[16], depth = 0;
    double left[16], s = 0;
    begin[0] = 0; length[0] = n; state[0] = 0;
    while (depth >= 0) {
        int half = length[depth] / 2;
        half -= half % 8;
        if (state[depth] == 0 && length[depth] > PAIRWISE) {
            state[depth] = 1;
            begin[depth + 1] = begin[depth]; length[depth + 1] = half; state[depth + 1] = 0;
            depth++;
        } else if (state[depth] == 1) {
            left[depth] = s;
            state[depth] = 2;
            begin[depth + 1] = begin[depth] + half; length[depth + 1] = length[depth] - half; state[depth + 1] = 0;
            depth++;
        } else {
            s = state[depth] == 2 ? left[depth] + s : numpy_sum_of_few(x + begin[depth], length[depth]);
            depth--;
        }
    }
    return s;
}

// Four float64 in [0, 1) of NumPy's Philox generator: those of the block ``number``, from 0.
__device__ void uniforms(const uint64 *key, int number, double *out) {
    uint64 c0 = (uint64)number + 1, c1 = 0, c2 = 0, c3 = 0, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64 high0 = __umul64hi(0xD2E7470EE14C6C93ull, c0), low0 = 0xD2E7470EE14C6C93ull * c0;
        uint64 high1 = __umul64hi(0xCA5A826395121157ull, c2), low1 = 0xCA5A826395121157ull * c2;
        c0 = high1 ^ c1 ^ k0; c1 = low1; c2 = high0 ^ c3 ^ k1; c3 = low0;
        k0 += 0x9E3779B97F4A7C15ull; k1 += 0xBB67AE8584CAA73Bull;
    }
    const double unit = 1.0 / 9007199254740992.0;
    out[0] = (double)(c0 >> 11) * unit; out[1] = (double)(c1 >> 11) * unit;
    out[2] = (double)(c2 >> 11) * unit; out[3] = (double)(c3 >> 11) * unit;
}

// Bytes of shared memory, to the byte; ``most``: of the graphs' keeps. Without ``far`` points and spreads are in it.
extern "C" __host__ __device__ int cells_bytes(int B, int Q, int most, int far) {
    int n = ROUND(B * 8) + ROUND((B + 1) * 8) + ROUND((most + 1) * 4) + ROUND((most + 3) / 4 * 32);
    n += ROUND(most * 4) + 3 * ROUND(B * 2) + ROUND((B / CHUNKS + 2) * 4) + ROUND(8);
    return n + (far ? 0 : ROUND(Q * (B + 1 + most) * 8));
}

extern "C" __global__ void cells_block(
    int B, int Q, int most, int squared,
    const double *__restrict__ basis,      // [G][Q][B], finished
    const double *__restrict__ values,     // [G][Q]
    const double *__restrict__ guidance,   // [G][B], >= 0; null: all rows count alike
    const uint64 *__restrict__ keys,       // [G][2] of each batch's generator (seeding.py)
    const double *__restrict__ turned,     // [G] how far the draws have gone on since the batch first came
    const int *__restrict__ keeps,         // [G] rows that stay, 1 to most
    double *__restrict__ far,              // [G][Q][B + 1 + most]: room, where shared memory has none; else null
    uint16_t *__restrict__ kept,           // [G][most] ascending
    float *__restrict__ score)             // [G][most] the first coordinate of each
{
    SHARED_MEMORY(memory);
    const long long graph = blockIdx.x;
    const int keep = keeps[graph], stride = B + 1;
    basis += graph * Q * B; values += graph * Q; keys += graph * 2; kept += graph * most; score += graph * most;
    if (guidance) guidance += graph * B;
    char *at = memory;
    #define TAKE(type, name, count) type *name = (type *)at; at += ROUND((int)sizeof(type) * (count))
    TAKE(double, weight, B); TAKE(double, reached, B + 1); TAKE(int, bounds, most + 1);
    TAKE(double, along, (most + 3) / 4 * 4); TAKE(int, widest, most);
    TAKE(uint16_t, order, B); TAKE(uint16_t, next, B); TAKE(uint16_t, node, B); TAKE(int, counted, B / CHUNKS + 2);
    TAKE(double, mean, 1);
    double *points = far ? far + graph * Q * (stride + most) : (double *)at;
    double *spread = points + Q * stride;  // [node][Q]
    double *seen = reached;  // until the cells are there

    EACH(i, B) { order[i] = (uint16_t)i; next[i] = (uint16_t)i; node[i] = 0; weight[i] = guidance ? guidance[i] : 1.0; }
    EACH(m, keep + 1) bounds[m] = m == keep ? B : 0;
    EACH(b, (keep + 3) / 4) uniforms(keys, b, along + 4 * b);
    EACH(t, Q * B) {
        double value = values[t / B];
        points[t / B * stride + t % B] = basis[t] / sqrt(value > SMALLEST ? value : SMALLEST);
    }
    SYNC();
    if (TID == THREADS - 1) mean[0] = numpy_sum(weight, B) / B;  // read after the next barriers
    for (int level = 0; 1 << level < keep; level++) {
        // along which coordinate each node varies most: one thread a node and coordinate, in order
        EACH(t, (1 << level) * Q) {
            Span s = span(t / Q, level, keep);
            if (s.b - s.a < 2) continue;
            const double *x = points + t % Q * stride;
            int begin = bounds[s.a], end = bounds[s.b];
            double middle = 0, total = 0;
            for (int i = begin; i < end; i++) middle += x[order[i]];
            middle /= end - begin;
            for (int i = begin; i < end; i++) { double step = x[order[i]] - middle; total += PRODUCT(step, step); }
            spread[t] = total;
        }
        SYNC();
        EACH(n, 1 << level) {
            Span s = span(n, level, keep);
            if (s.b - s.a < 2) continue;
            int best = 0, middle = s.a + (s.b - s.a) / 2, begin = bounds[s.a], end = bounds[s.b];
            double width = -1;
            for (int q = 0; q < Q; q++) if (spread[n * Q + q] > width) { best = q; width = spread[n * Q + q]; }
            widest[n] = best;
            bounds[middle] = begin + (int)((long long)(end - begin) * (middle - s.a) / (s.b - s.a));
        }
        SYNC();
        EACH(i, B) {
            Span s = span(node[i], level, keep);
            seen[i] = s.b - s.a < 2 ? 0 : points[widest[node[i]] * stride + order[i]];
        }
        SYNC();
        EACH(i, B) {  // C3
            Span s = span(node[i], level, keep);
            int row = order[i];
            if (s.b - s.a < 2) { next[i] = (uint16_t)row; node[i] = (uint16_t)(2 * node[i]); continue; }
            int begin = bounds[s.a], end = bounds[s.b], rank = begin;
            double x = seen[i];
            for (int j = begin; j < end; j++) rank += seen[j] < x || (seen[j] == x && order[j] < row);
            next[rank] = (uint16_t)row;
            node[i] = (uint16_t)(2 * node[i] + (i >= bounds[s.a + (s.b - s.a) / 2]));
        }
        SYNC();
        uint16_t *other = order; order = next; next = other;
    }
    // each cell's rows ascending, with what they weigh; ``node`` is the final level's
    int levels = 0;
    while (1 << levels < keep) levels++;
    EACH(i, B) {
        Span s = span(node[i], levels, keep);
        int begin = bounds[s.a], end = bounds[s.b], rank = begin, row = order[i];
        for (int j = begin; j < end; j++) rank += order[j] < row;
        next[rank] = (uint16_t)row;
    }
    SYNC();
    EACH(i, B) {
        double w = mean[0] > 0 ? weight[next[i]] + PRODUCT(FLOOR, mean[0]) : 1.0;
        reached[i + 1] = squared ? PRODUCT(w, w) : w;
        node[i] = 0;  // from here on: whether the row stays
    }
    SYNC();
    EACH(n, 1) {
        double s = 0;
        reached[0] = 0;
        for (int i = 1; i <= B; i++) { s += reached[i]; reached[i] = s; }
    }
    SYNC();
    EACH(m, keep) {
        double first = reached[bounds[m]], last = reached[bounds[m + 1]], u = along[m] + turned[graph];
        double goal = first + PRODUCT(u - floor(u), last - first);
        int low = 0, high = B;  // how many of reached[1:] are not above the goal
        while (low < high) { int middle = (low + high) / 2; if (goal < reached[middle + 1]) high = middle; else low = middle + 1; }
        low = low < bounds[m] ? bounds[m] : low;
        low = low > bounds[m + 1] - 1 ? bounds[m + 1] - 1 : low;
        node[next[low]] = 1;
    }
    SYNC();
    const int chunks = (B + CHUNKS - 1) / CHUNKS;
    EACH(c, chunks) {
        int n = 0;
        for (int i = c * CHUNKS; i < B && i < (c + 1) * CHUNKS; i++) n += node[i];
        counted[c] = n;
    }
    SYNC();
    EACH(c, chunks) {
        int n = 0;
        for (int before = 0; before < c; before++) n += counted[before];
        for (int i = c * CHUNKS; i < B && i < (c + 1) * CHUNKS; i++)
            if (node[i] && n < keep) { kept[n] = (uint16_t)i; score[n] = (float)basis[i]; n++; }
    }
}
