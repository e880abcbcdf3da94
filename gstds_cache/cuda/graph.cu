// One thread block makes one graph from its rows' inner products: the k nearest of every row, their union graph as CSR,
// its components, and the bridges that join them. Same three ways to compile as fiedler_block.cu.
//
// Invariants:
//   J1  Thread i reads column i of the products, p[j][i]: neighbouring threads read neighbouring words. (p is symmetric;
//       row i's similarity to j IS clamp(p[j][i] * (r_i r_j)), whichever way a library sums.)
//   J2  Entries are met by rising j and taken in only if larger than the least held: of equals the first stays, as in
//       graph/compiled.py, also at the last place; no second look is ever needed.
//   J3  Rows of the CSR are written by the thread that owns them, columns rising; no atomics: the same bits always.
//   J4  Components carry their lowest node as label; bridges are those of Prim's algorithm from the largest component
//       (graph/components.py), ties to the lowest outside node, then the lowest inside node.
#include "block.cuh"
#ifndef KNN
#define KNN 10
#endif
#ifdef EMULATE
#define BOUNDS
#define UNROLL
#else
#define BOUNDS __launch_bounds__(512, KNN <= 16 ? 2 : 1)
#define UNROLL _Pragma("unroll")
#endif
#define BRIDGE_FLOOR 1e-3f
#define LOW (-3.0f)  // below every cosine

// Bytes of shared memory of a block, to the byte; as graph/cuda.py has it. With SPILL the lists of neighbours, which are
// most of it, lie in a workspace in global memory.
extern "C" __host__ __device__ int graph_lists_bytes(int B) { return ROUND(B * KNN * 2) + ROUND(B * KNN * 4); }
extern "C" __host__ __device__ int graph_bytes(int B) {
    int n = 4 * ROUND((B + 1) * 4) + 3 * ROUND(B * 2) + ROUND(B * 4);
#ifndef SPILL
    n += graph_lists_bytes(B);
#endif
    return n;
}

extern "C" __global__ void BOUNDS graph_block(
    int B, int k, int edges_room, int bridge_room,
    const float *__restrict__ products,  // [G][B][B]
    const float *__restrict__ inverse,   // [G][B] 1 / length of each row, 0 for zero rows; null: rows have unit length
    uint16_t *__restrict__ neighbors,    // [G][B][k], nearest first
    float *__restrict__ similarities,    // [G][B][k]
    int *__restrict__ crow_all,          // [G][B + 1]
    uint16_t *__restrict__ col_all,      // [G][edges_room]
    float *__restrict__ weight_all,      // [G][edges_room]
    int *__restrict__ components,        // [G]; before bridging; negative where edges or bridges have no room
    uint16_t *__restrict__ label_all,    // [G][B] lowest node of each node's component
    int *__restrict__ bridge_ends,       // [G][bridge_room][2]: room
    float *__restrict__ bridge_weight    // [G][bridge_room]: room
#ifdef SPILL
    , char *workspace                    // graph_lists_bytes() of each graph
#endif
) {
    SHARED_MEMORY(memory);
    const long long graph = blockIdx.x;
    const float *p = products + graph * B * B;
    const float *r = inverse ? inverse + graph * B : 0;
    crow_all += graph * (B + 1); col_all += graph * edges_room; weight_all += graph * edges_room;
    bridge_ends += graph * bridge_room * 2; bridge_weight += graph * bridge_room;
    char *at = memory;
    #define TAKE(type, name, count) type *name = (type *)at; at += ROUND((int)sizeof(type) * (count))
#ifdef SPILL
    uint16_t *near = (uint16_t *)(workspace + graph * graph_lists_bytes(B));
    float *cosine = (float *)((char *)near + ROUND(B * KNN * 2));
#else
    TAKE(uint16_t, near, B * KNN);  // [k][B], by rising index: row i's are near[a * B + i]
    TAKE(float, cosine, B * KNN);
#endif
    TAKE(int, crow, B + 1); TAKE(int, length, B + 1); TAKE(int, label, B + 1); TAKE(int, next, B + 1);
    TAKE(uint16_t, inside, B); TAKE(uint16_t, entered, B); TAKE(uint16_t, closest, B);
    TAKE(float, best, B);
    #define COSINE(j, i) fminf(fmaxf(p[(long long)(j) * B + (i)] * (r ? r[i] * r[j] : 1.0f), -1.0f), 1.0f)

    // the k nearest (J1, J2)
    EACH(i, B) {
        float value[KNN];
        int name[KNN];
        for (int a = 0; a < KNN; a++) { value[a] = LOW; name[a] = 0; }
        for (int j = 0; j < B; j++) {
            if (j == i) continue;
            float c = COSINE(j, i);
            if (c > value[KNN - 1]) {  // KNN places are kept, k of them are written: no index that is not a constant
                int n = j;
                bool in = false;  // from the first smaller one on, each moves down by a place: equals stay in order
                UNROLL
                for (int a = 0; a < KNN; a++) {
                    in = in || c > value[a];
                    if (in) { float v = value[a]; int m = name[a]; value[a] = c; name[a] = n; c = v; n = m; }
                }
            }
        }
        for (int a = 0; a < KNN; a++) if (a < k) {
            neighbors[(graph * B + i) * k + a] = (uint16_t)name[a];
            similarities[(graph * B + i) * k + a] = value[a];
            int b = a;  // by rising index, where the union looks for them
            while (b > 0 && near[(b - 1) * B + i] > name[a]) {
                near[b * B + i] = near[(b - 1) * B + i];
                cosine[b * B + i] = cosine[(b - 1) * B + i];
                b--;
            }
            near[b * B + i] = (uint16_t)name[a];
            cosine[b * B + i] = value[a];
        }
    }
    SYNC();
    // the union graph, twice: first the lengths, then, bridges included, the rows (J3)
    int bridges = 0, count = 1;
    for (int pass = 0; pass < 3; pass++) {
        // 0: lengths without bridges; 1: rows without bridges, read by the components; 2: with bridges, where there are any
        if (pass == 2 && bridges == 0) break;
        for (int fill = pass == 0 ? 0 : pass == 1 ? 1 : 0; fill < (pass == 0 ? 1 : 2); fill++) {
            EACH(i, B) {
                int a = 0, n = 0, to = fill ? crow[i] : 0;
                int partner = B; float joined = 0;
                for (int b = 0; b < bridges; b++) {  // the lowest partner by a bridge
                    int u = bridge_ends[2 * b], v = bridge_ends[2 * b + 1], other = u == i ? v : v == i ? u : B;
                    if (other < partner) { partner = other; joined = bridge_weight[b]; }
                }
                for (int j = 0; j < B; j++) {
                    float w = 0;
                    if (a < k && near[a * B + i] == j) w = cosine[a++ * B + i];
                    for (int b = 0; b < k; b++) if (near[b * B + j] == i) w = fmaxf(w, cosine[b * B + j]);
                    if (j == partner) {
                        w = joined;
                        int last = partner;
                        partner = B;
                        for (int b = 0; b < bridges; b++) {
                            int u = bridge_ends[2 * b], v = bridge_ends[2 * b + 1], other = u == i ? v : v == i ? u : B;
                            if (other > last && other < partner) { partner = other; joined = bridge_weight[b]; }
                        }
                    }
                    if (w > 0 && j != i) {
                        if (fill && to + n < edges_room) { col_all[to + n] = (uint16_t)j; weight_all[to + n] = w; }
                        n++;
                    }
                }
                if (!fill) length[i] = n;
            }
            SYNC();
            if (!fill) {
                // sums of the lengths, in place of a scan: B^2 / 2 additions by B threads
                EACH(i, B + 1) { int s = 0; for (int j = 0; j < i; j++) s += length[j]; crow[i] = s; crow_all[i] = s; }
                SYNC();
                if (crow[B] > edges_room) {  // uniform
                    EACH(i, 1) components[graph] = -1;
                    return;
                }
            }
        }
        if (pass != 1) continue;
        // components: each node takes the lowest label around it, and that one's own; until nothing changes (J4)
        EACH(i, B) label[i] = i;
        SYNC();
        for (;;) {
            int changed = 0;
            EACH(i, B) {
                int low = label[i];
                for (int e = crow[i]; e < crow[i + 1]; e++) { int l = label[col_all[e]]; low = l < low ? l : low; }
                next[i] = low;
            }
            SYNC();
            EACH(i, B) {
                int l = next[next[i]];
                changed |= l != label[i];
                label[i] = l;
            }
            if (!__syncthreads_or(changed)) break;
        }
        EACH(i, B) {  // sizes, by each component's lowest node
            int n = 0;
            if (label[i] == i) for (int j = 0; j < B; j++) n += label[j] == i;
            length[i] = n;
            label_all[graph * B + i] = (uint16_t)label[i];
        }
        SYNC();
        int largest = 0;
        count = 0;
        for (int i = 0; i < B; i++) { count += length[i] > 0; if (length[i] > length[largest]) largest = i; }
        if (count - 1 > bridge_room) { EACH(i, 1) components[graph] = -1; return; }
        EACH(i, 1) components[graph] = count;
        if (count == 1) continue;
        // Prim (J4): ``entered`` are the nodes that came in last
        EACH(i, B) { best[i] = LOW; closest[i] = (uint16_t)(B - 1); inside[i] = label[i] == largest; entered[i] = inside[i]; }
        SYNC();
        for (bridges = 0; bridges < count - 1; bridges++) {
            EACH(i, B) if (!inside[i]) {
                float reach = LOW; int from = B;
                for (int j = 0; j < B; j++) if (entered[j]) { float c = COSINE(j, i); if (c > reach) { reach = c; from = j; } }
                if (reach > best[i] || (reach == best[i] && from < closest[i])) { best[i] = reach; closest[i] = (uint16_t)from; }
            }
            SYNC();
            int winner = -1;
            for (int i = 0; i < B; i++) if (!inside[i] && (winner < 0 || best[i] > best[winner])) winner = i;
            EACH(i, 1) {
                bridge_ends[2 * bridges] = closest[winner]; bridge_ends[2 * bridges + 1] = winner;
                bridge_weight[bridges] = fmaxf(fmaxf(best[winner], 0.0f), BRIDGE_FLOOR);
            }
            SYNC();
            EACH(i, B) { entered[i] = label[i] == label[winner]; inside[i] |= entered[i]; }
            SYNC();
        }
    }
}
