// One thread block solves one graph: LOBPCG for the lowest nontrivial eigenpairs of its Laplacian.
//
// Compiled three ways from this one text: by NVRTC for the GPU at hand (what users run), by nvcc/NVRTC for named
// architectures without a GPU (registers, spills, shared memory), and by g++ with -DEMULATE, where each CUDA thread is a
// fibre and a schedule says in which order the fibres run between two barriers (tests).
//
// Letters: A Laplacian, X iterates (float64), R residuals, W preconditioned residuals, P directions (float32), T room; M
// vectors in the block, K = 3 M in the basis [X, W, P]. Blocks are [B][M]: a node's M numbers are adjacent.
//
// Invariants at the head of an iteration (I):
//   I1  X is orthogonal to the null vector (projected in float64) and orthonormal up to rounding; theta is ascending.
//   I2  R = A X - X theta, from a fresh product in float64; only its rounding to float32 is kept.
//   I3  W and P are float32, and their products with each other are summed in float32. What they really are enters the
//       Gram matrices, so their rounding costs speed of convergence at most: x^T A w = theta x^T w + r^T w.
//   I4  Every sum is over interleaved parts, each in order, then over the parts in order: the bits depend on B and M and
//       not on the number of threads, the other graphs or the schedule.
#include "block.cuh"
#ifndef M
#define M 2
#endif
#define K (3 * M)
#define S K  // length of a row of the small matrices; not K + 1, where (p, u) and (p + 1, u + 1) lie in one bank of memory
#define HALF (K / 2)
#define BATCH (K * M < 32 ? K * M : 32)  // sums at once: part[] has room for BATCH * CHUNKS
#define TILE (M % 5 == 0 ? 5 : 2)        // Gram matrices: a task is TILE x TILE pairs of vectors over one part of the rows
#define PARTS (M <= 4 ? 32 : M <= 12 ? 8 : 4)  // what they hold fits into U and part[]
#define TASKS ((M / TILE) * (M / TILE) * PARTS)
#define SECTION ((TASKS + 31) / 32 * 32)
#define HTASKS ((HALF * (HALF / 2 + 1) + 31) / 32 * 32)  // the small problem: those of H, in whole warps
#define UROWS (K < 8 ? K : 8)                            // and over how many the rows of U are spread
// Of a direction of length 1, what those before it leave: its image is rounded to float32, and what is left of that must
// stay well above the rounding. With 1e-10 a graph of 20 clusters did not converge: noise passed for a small eigenvalue.
#define DEPENDENT 1e-5
// Squares of entries beside the squares of the values they couple. The residual of a value 1e-8 of the largest is below
// 1e-7 then; with 1e-20 it stayed at 2e-6.
#define NEGLIGIBLE 1e-24
#define DEGENERATE_GAP 1e-3
#define MAX_SWEEPS 15
// Degree of the polynomial, and the lower end of where it is small, by iteration: a slow graph gets more of it.
#define FEW (M <= 4 ? 12 : 16)
#define MORE (M <= 4 ? 24 : 28)
#define MANY 48

#ifdef EMULATE
#define BOUNDS
#define UNROLL2
#define UNROLL4
struct float2 { float x, y; };
struct double2 { double x, y; };
static inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
#else
#define BOUNDS __launch_bounds__(256, M <= 4 ? 2 : 1)
#define UNROLL2 _Pragma("unroll 2")
#define UNROLL4 _Pragma("unroll 4")
#endif
template <typename F> struct Two;
template <> struct Two<float> { typedef float2 type; };
template <> struct Two<double> { typedef double2 type; };


struct Graph { int B; const int *crow; const uint16_t *col; const float *w; const double *diag; const float *inverse;
               const double *scale; const uint16_t *order; };

// ---- products -------------------------------------------------------------------------------------------------------
// Of two adjacent vectors, v and v + 1: an edge's weight and end are read once for both.
template <typename F> __device__ __forceinline__ typename Two<F>::type product(const Graph &g, const F *x, int i, int v) {
    typedef typename Two<F>::type F2;
    F s = 0, t = 0;
    const F *xv = x + v;
    if (g.scale) {
        UNROLL4
        for (int e = g.crow[i]; e < g.crow[i + 1]; e++) {
            int j = g.col[e];
            F w = (F)g.w[e] * (F)g.scale[j];
            F2 y = *(const F2 *)(xv + j * M);
            s += w * y.x;
            t += w * y.y;
        }
        s *= (F)g.scale[i];
        t *= (F)g.scale[i];
    } else {
        UNROLL4
        for (int e = g.crow[i]; e < g.crow[i + 1]; e++) {
            F w = (F)g.w[e];
            F2 y = *(const F2 *)(xv + g.col[e] * M);
            s += w * y.x;
            t += w * y.y;
        }
    }
    F2 own = *(const F2 *)(xv + i * M), out;
    out.x = (F)g.diag[i] * own.x - s;
    out.y = (F)g.diag[i] * own.y - t;
    return out;
}

// ---- Gram matrices: inner products of blocks of M vectors ------------------------------------------------------------
// A value is read once for TILE pairs. Products with X or R are summed in float64: an error of them is one of X, and a
// small eigenvalue beside a large one shows it. Those among W and P are summed in float32, which is what they are rounded
// to (I3): such an error costs speed of convergence.
template <typename A, typename F, typename E> __device__ __forceinline__ void gram_tile(int B, const F *rows, const E *columns,
                                                                                        int part, A *out) {
    A sum[TILE][TILE];
    for (int a = 0; a < TILE; a++) for (int b = 0; b < TILE; b++) sum[a][b] = 0;
    UNROLL2
    for (int i = part; i < B; i += PARTS) {
        A x[TILE], y[TILE];
        for (int a = 0; a < TILE; a++) x[a] = rows[i * M + a];
        for (int b = 0; b < TILE; b++) y[b] = columns[i * M + b];
        for (int a = 0; a < TILE; a++) for (int b = 0; b < TILE; b++) sum[a][b] += x[a] * y[b];
    }
    for (int a = 0; a < TILE; a++) for (int b = 0; b < TILE; b++) out[a * M + b] = sum[a][b];
}

// The products of `first` (X or R) with `columns` in parts [PARTS][M][M] of float64; behind them, unless `image` is null,
// those of W and of P with `image`, [2][PARTS][M][M] of float32. A warp's tasks are of one section.
template <typename F, typename E> __device__ void gram(int B, const F *first, const E *columns, const float *W,
                                                       const float *P, const float *image, double *out) {
    float *others = (float *)(out + PARTS * M * M);
    EACH(t, (image ? 3 : 1) * SECTION) {
        int section = t / SECTION, task = t % SECTION;
        if (task >= TASKS) continue;
        int part = task / (TASKS / PARTS), tile = task % (TASKS / PARTS);
        int a = tile / (M / TILE) * TILE, b = tile % (M / TILE) * TILE;
        int to = (part * M + a) * M + b;
        if (section == 0) gram_tile(B, first + a, columns + b, part, out + to);
        else gram_tile(B, (section == 1 ? W : P) + a, image + b, part, others + (section - 1) * PARTS * M * M + to);
    }
    SYNC();
}

// The sum over the parts of entry [a][b], a < K.
__device__ __forceinline__ double total(const double *parts, int a, int b) {
    double s = 0;
    if (a < M) for (int c = 0; c < PARTS; c++) s += parts[(c * M + a) * M + b];
    else {
        const float *others = (const float *)(parts + PARTS * M * M) + (a / M - 1) * PARTS * M * M;
        for (int c = 0; c < PARTS; c++) s += others[(c * M + a % M) * M + b];
    }
    return s;
}

// ---- the small problem: H Y = G Y diag(theta), lowest M, in a basis that may be dependent ---------------------------
// 1 / x for x between 1e-30 and 1e30: float32's and one step of third order.
__device__ __forceinline__ double inverse_of(double x) {
    float root = rsqrtf((float)x);
    double y = root * root, e = 1 - x * y;
    return y + y * (e + e * e);
}
// The pair (p, q) of rows that turn together: the circle method.
__device__ __forceinline__ void pair_of(int round, int i, int &p, int &q) {
    p = round + i;
    q = round + K - 1 - i;
    p = i == 0 ? K - 1 : p >= K - 1 ? p - (K - 1) : p;
    q = q >= K - 1 ? q - (K - 1) : q;
}
// Cosine and sine that make H[p][q] vanish, but for 1e-7 of it: float32's, scaled by one step of Newton's so that the
// rotation is float64's. Without a branch, so that two of them overlap. True where it is not negligible.
__device__ __forceinline__ bool rotation(const double *H, int p, int q, double &c, double &s) {
    double a = H[p * S + q], x = H[p * S + p], y = H[q * S + q];
    float d = (float)(y - x), twice = (float)(2 * a), square = d * d + twice * twice;
    bool turned = a * a > NEGLIGIBLE * fabs(x * y) && square > 1e-36f;
    float over = rsqrtf(square), half = 0.5f + 0.5f * fabsf(d) * over, root = rsqrtf(half);
    double cosine = turned ? half * root : 1.0f, sine = turned ? (d >= 0 ? 0.5f : -0.5f) * twice * over * root : 0.0f;
    double scale = 1.5 - 0.5 * (cosine * cosine + sine * sine);
    c = cosine * scale;
    s = sine * scale;
    return turned;
}

// H, G [K][S], both triangles; destroyed, as `room` [K][S] is. Y [K][M]. All threads call; values are the same for any
// number of threads.
__device__ void rayleigh_ritz(double *G, double *H, double *U, double *room, double *rot, double *size, double *Y,
                              double *theta, int used) {
    EACH(a, K) size[a] = a < used && G[a * S + a] > 1e-300 ? 1 / sqrt(G[a * S + a]) : 0.0;
    SYNC();
    EACH(t, K * K) {
        int a = t / K, b = t % K;
        double s = size[a] * size[b];
        G[a * S + b] *= s;
        H[a * S + b] *= s;
    }
    SYNC();
    // Elimination by G = L D L^T, unit lower L: H := L^-1 H L^-T and, below its diagonal, G := L^-1. A direction that depends
    // on those before it (or is 0) leaves. The lower triangle has K (K + 1) / 2 tasks, two of its rows in one of these.
    for (int j = 0; j < K; j++) {
        EACH(a, K) {
            Y[a] = H[(a > j ? a : j) * S + (a > j ? j : a)];      // of H, column j
            room[a] = G[(a > j ? a : j) * S + (a > j ? j : a)];   // before j of L^-1, row j; after it of G, column j
        }
        SYNC();
        double d = room[j], own = Y[j];
        if (d > DEPENDENT) {
            double share = inverse_of(d);
            EACH(t, K / 2 * (K + 1)) {
                int r = t / (K + 1), c = t % (K + 1), a = c < K - r ? K - 1 - r : r, b = c < K - r ? c : c - (K - r);
                double la = a > j ? room[a] * share : 0, lb = b > j ? room[b] * share : 0;
                H[a * S + b] += la * lb * own - la * Y[b] - lb * Y[a];
                if (a > j) G[a * S + b] = b == j ? -la : G[a * S + b] - la * room[b];
            }
            EACH(i, 1) rot[j] = d;
        } else {
            EACH(i, 1) { rot[j] = 1; size[j] = 0; }
            EACH(a, K) { if (a > j) G[a * S + j] = 0; if (a < j) G[j * S + a] = 0; }
        }
        SYNC();
    }
    EACH(j, K) rot[j] = 1 / sqrt(rot[j]);
    SYNC();
    EACH(t, K * K) {  // those that left: uncoupled, and above everything else (the scaled H has no entry beyond its trace)
        int a = t / K, b = t % K;
        U[a * S + b] = a == b;
        if (b > a) continue;
        double h = size[a] == 0 || size[b] == 0 ? (a == b ? 1e30 : 0) : H[a * S + b] * rot[a] * rot[b];
        H[a * S + b] = h;
        H[b * S + a] = h;
        G[a * S + b] = a == b ? 1 : size[a] == 0 || size[b] == 0 ? 0 : G[a * S + b];
    }
    SYNC();
    // Cyclic Jacobi, K / 2 rotations at once, one barrier a round: from `now` to `next`, where each 2 x 2 block and its mirror
    // belong to one task, which finds both of its rotations itself. The others turn the columns of U, four rows each.
    double *now = H, *next = room;
    for (int sweep = 0; sweep < MAX_SWEEPS; sweep++) {
        int turned = 0;
        for (int round = 0; round < K - 1; round++) {
            EACH(t, HTASKS + HALF * UROWS) {
                if (t < HTASKS) {
                    if (t >= HALF * (HALF / 2 + 1)) continue;
                    int i = t % HALF, j = i + t / HALF;  // each unordered pair once (twice, were HALF even, at half way round)
                    if (HALF % 2 == 0 && t / HALF == HALF / 2 && i >= HALF / 2) continue;
                    if (j >= HALF) j -= HALF;
                    int p, q, u, v;
                    pair_of(round, i, p, q);
                    pair_of(round, j, u, v);
                    double pu = now[p * S + u], pv = now[p * S + v], qu = now[q * S + u], qv = now[q * S + v], ci, si, cj, sj;
                    bool more = rotation(now, p, q, ci, si);
                    rotation(now, u, v, cj, sj);
                    turned |= more && i == j;
                    double lu = ci * pu - si * qu, lv = ci * pv - si * qv, mu = si * pu + ci * qu, mv = si * pv + ci * qv;
                    pu = cj * lu - sj * lv;
                    pv = sj * lu + cj * lv;
                    qu = cj * mu - sj * mv;
                    qv = sj * mu + cj * mv;
                    next[p * S + u] = pu;
                    next[p * S + v] = pv;
                    next[q * S + v] = qv;
                    if (i == j) { next[q * S + u] = pv; continue; }
                    next[q * S + u] = qu;
                    next[u * S + p] = pu;
                    next[v * S + p] = pv;
                    next[u * S + q] = qu;
                    next[v * S + q] = qv;
                } else {
                    int r = t - HTASKS, j = r % HALF, u, v;
                    double cj, sj;
                    pair_of(round, j, u, v);
                    rotation(now, u, v, cj, sj);
                    for (int k = r / HALF; k < K; k += UROWS) {
                        double x = U[k * S + u], y = U[k * S + v];
                        U[k * S + u] = cj * x - sj * y;
                        U[k * S + v] = sj * x + cj * y;
                    }
                }
            }
            SYNC();
            double *other = now;
            now = next;
            next = other;
        }
        if (!__syncthreads_or(turned)) break;
    }
    EACH(a, K) {  // the rank of each value; equal ones by their place
        int rank = 0;
        for (int b = 0; b < K; b++) {
            double x = now[b * S + b], y = now[a * S + a];
            rank += x < y || (x == y && b < a);
        }
        if (rank < M) {
            theta[rank] = now[a * S + a];
            next[rank] = a;
        }
    }
    SYNC();
    EACH(t, K * M) {  // back to the basis: L^-T D^-1/2 U
        int r = t / M, v = t % M, a = next[v] >= 0 && next[v] < K ? (int)next[v] : 0;  // NaN have no ranks: no place is theirs
        double s = 0;
        for (int k = r; k < K; k++) s += G[k * S + r] * rot[k] * U[k * S + a];
        Y[t] = s * size[r];
    }
    SYNC();
}

// ---- one graph ------------------------------------------------------------------------------------------------------

// Bytes of shared memory, to the byte: the emulator puts a fence behind them.
#define ROOM(B) ((B) * M > 2 * K * S ? (B) * M : 2 * K * S)  // float32s; the small problem uses one of them as a matrix
extern "C" __host__ __device__ int fiedler_bytes(int B, int edges, int normalized) {
    int n = ROUND(B * M * 8) + ROUND(B * 8) + 2 * ROUND(K * S * 8) + 2 * ROUND(K * 8) + ROUND(K * M * 8);
    n += 2 * ROUND(M * 8) + ROUND((2 * M + 4) * 8);                  // theta, error, few
    n += 2 * ROUND(B * M * 4) + 2 * ROUND(ROOM(B) * 4) + ROUND(edges * 4) + ROUND(B * 4);      // R W P T, w, inverse
    n += ROUND((B + 1) * 4) + ROUND(edges * 2) + ROUND(B * 2);        // crow, col, order
    n += normalized ? 2 * ROUND(B * 8) : 0;
    return n + ROUND((K * S + BATCH * CHUNKS) * 8);
}

extern "C" __global__ void BOUNDS fiedler_block(
    int B, int Q, int edges_room, int normalized, double tolerance, int max_iterations,
    int shared_bytes, char *__restrict__ workspace,  // with SPILL: what there is, and fiedler_bytes() of each graph
    const int *__restrict__ crow_all,        // [G][B + 1], from 0 in each graph
    const uint16_t *__restrict__ col_all,    // [G][edges_room]
    const float *__restrict__ weight_all,    // [G][edges_room]
    const double *__restrict__ start,        // [B][M], the same for every graph
    double *__restrict__ values,             // [G][Q]
    double *__restrict__ basis,              // [G][Q][B]
    double *__restrict__ residual,           // [G][Q]
    double *__restrict__ second,             // [G]
    int *__restrict__ iterations,            // [G]
    int *__restrict__ converged             // [G]: 1, or 0 at max_iterations, or -1 where the graph does not fit
    )
{
    SHARED_MEMORY(memory);
    const int graph = blockIdx.x;
    crow_all += (long long)graph * (B + 1);
    col_all += (long long)graph * edges_room;
    weight_all += (long long)graph * edges_room;
    const int edges = crow_all[B];
    if (edges > edges_room) {  // uniform
        EACH(i, 1) { iterations[graph] = 0; converged[graph] = -1; }
        return;
    }
    char *at = memory;
    // In the order of how often they are touched. With SPILL, what no longer fits goes to a workspace in global memory.
#ifdef SPILL
    char *end = memory + shared_bytes, *far = workspace + (long long)graph * fiedler_bytes(B, edges_room, normalized);
    #define TAKE(type, name, count) type *name; { int size_ = ROUND((int)sizeof(type) * (count)); \
        if (at + size_ <= end) { name = (type *)at; at += size_; } else { name = (type *)far; far += size_; } }
#else
    #define TAKE(type, name, count) type *name = (type *)at; at += ROUND((int)sizeof(type) * (count))
#endif
    TAKE(double, H, K * S); TAKE(double, G, K * S);
    TAKE(double, rot, K); TAKE(double, size, K); TAKE(double, Y, K * M);
    TAKE(double, theta, M); TAKE(double, error, M); TAKE(double, few, 2 * M + 4);
    TAKE(double, U, K * S + BATCH * CHUNKS);  // one piece: the Gram matrices' parts need both
    double *part = U + K * S;
    TAKE(int, crow, B + 1); TAKE(uint16_t, order, B); TAKE(float, inverse, B); TAKE(double, diag, B);
    TAKE(float, W, ROOM(B)); TAKE(float, T, ROOM(B));
    TAKE(uint16_t, col, edges_room); TAKE(float, w, edges_room);
    TAKE(double, X, B * M); TAKE(float, R, B * M); TAKE(float, P, B * M);
    double *scale = 0, *null = 0;
    if (normalized) {
        TAKE(double, scale_, B);
        TAKE(double, null_, B);
        scale = scale_;
        null = null_;
    }

    EACH(i, B + 1) crow[i] = crow_all[i];
    EACH(e, edges) { col[e] = col_all[e]; w[e] = weight_all[e]; }
    SYNC();
    EACH(i, B) {
        double d = 0;
        for (int e = crow[i]; e < crow[i + 1]; e++) d += (double)w[e];
        diag[i] = d;
        int rank = 0, degree = crow[i + 1] - crow[i];  // rows by falling degree: a warp's rows are of one length
        for (int j = 0; j < B; j++) {
            int other = crow[j + 1] - crow[j];
            rank += other > degree || (other == degree && j < i);
        }
        order[rank] = (uint16_t)i;
    }
    SYNC();
    double flat = 1 / sqrt((double)B);
    if (normalized) {
        sums_in_chunks<BATCH>(1, B, part, few, [&](int, int i) { return diag[i]; });
        double total = few[0];
        EACH(i, B) { scale[i] = 1 / sqrt(diag[i]); null[i] = sqrt(diag[i] / total); diag[i] = 1; }
    }
    EACH(i, B) inverse[i] = (float)(1 / diag[i]);
    EACH(t, B * M) { X[t] = start[t]; P[t] = 0; }
    EACH(v, M) theta[v] = 0;
    SYNC();
    Graph g = {B, crow, col, w, diag, inverse, scale, order};
    int iteration = 0, used = 2 * M, reached = 0;
    for (bool first = true;; first = false) {
        // X without the null vector (I1)
        sums_in_chunks<BATCH>(M, B, part, few, [&](int v, int i) { return X[i * M + v] * (null ? null[i] : flat); });
        EACH(t, B * M) X[t] -= few[t % M] * (null ? null[t / M] : flat);
        SYNC();
        if (first) {  // orthonormal and rotated, by a Rayleigh-Ritz of X alone: W and P are 0 and left out
            EACH(t, B * M / 2) {
                int i = order[t / (M / 2)], v = t % (M / 2) * 2;
                double2 ax = product<double>(g, X, i, v);
                R[i * M + v] = (float)ax.x;
                R[i * M + v + 1] = (float)ax.y;
            }
            SYNC();
            gram(B, X, R, (float *)0, (float *)0, (float *)0, U);
            EACH(t, M * M) Y[t] = total(U, t / M, t % M);
            SYNC();
            gram(B, X, X, (float *)0, (float *)0, (float *)0, U);
            EACH(t, K * K) {
                int a = t / K, b = t % K;
                bool in = a < M && b < M;
                G[a * S + b] = in ? total(U, a, b) : 0;
                H[a * S + b] = in ? (Y[a * M + b] + Y[b * M + a]) / 2 : 0;
            }
            SYNC();
            rayleigh_ritz(G, H, U, (double *)W, rot, size, Y, theta, M);
            EACH(i, B) {
                double x[M];
                for (int v = 0; v < M; v++) x[v] = X[i * M + v];
                for (int v = 0; v < M; v++) {
                    double s = 0;
                    for (int k = 0; k < M; k++) s += x[k] * Y[k * M + v];
                    X[i * M + v] = s;
                }
            }
            SYNC();
        }
        // R = A X - X theta; theta is corrected by the quotient of the X that is there now (I2)
        EACH(t, B * M / 2) {
            int i = order[t / (M / 2)], v = t % (M / 2) * 2;
            double2 ax = product<double>(g, X, i, v);
            R[i * M + v] = (float)(ax.x - theta[v] * X[i * M + v]);
            R[i * M + v + 1] = (float)(ax.y - theta[v + 1] * X[i * M + v + 1]);
        }
        SYNC();
        sums_in_chunks<BATCH>(2 * M, B, part, few, [&](int p, int i) {
            int v = p % M;
            return X[i * M + v] * (p < M ? X[i * M + v] : (double)R[i * M + v]);
        });
        EACH(t, B * M) { int v = t % M; R[t] = (float)(R[t] - few[M + v] / few[v] * X[t]); }
        SYNC();
        EACH(v, M) theta[v] += few[M + v] / few[v];
        sums_in_chunks<BATCH>(M, B, part, error, [&](int v, int i) { return (double)R[i * M + v] * (double)R[i * M + v]; });
        EACH(v, M) error[v] = theta[v] > 0 ? sqrt(error[v] / few[v]) / theta[v] : 1e300;
        SYNC();
        reached = 1;
        for (int v = 0; v < Q; v++) reached &= error[v] <= tolerance;
        reached &= theta[1] * (1 - error[1]) - theta[0] > DEGENERATE_GAP * theta[1] ||
                   error[1] <= fmax(tolerance, 0.1 * DEGENERATE_GAP);
        if (reached || iteration == max_iterations) break;
        iteration++;
        // W = p(D^-1 A) D^-1 R, p the Chebyshev polynomial for [low, 2]: 2 bounds the spectrum of D^-1 A (Gershgorin).
        // Harder graphs get more of it.
        const int stage = iteration <= FEW ? 0 : iteration <= MORE ? 1 : iteration <= MANY ? 2 : 3;
        const int degree = stage == 0 ? 4 : stage == 1 ? (M <= 4 ? 16 : 24) : stage == 2 ? 48 : 96;
        const float low = stage == 0 ? 0.2f : stage == 1 ? (M <= 4 ? 0.02f : 0.01f) : stage == 2 ? 0.002f : 0.0005f;
        const float centre = (2 + low) / 2, radius = (2 - low) / 2, sigma = centre / radius;
        EACH(t, B * M) {
            int i = t / M, v = t % M;
            // Converged pairs get no new directions (soft locking): zeros leave the basis in the small problem.
            bool active = error[v] > tolerance;
            float r = active ? (float)(R[t] / (error[v] * theta[v])) : 0.0f;
            R[t] = r;  // of unit length from here on
            if (!active) P[t] = 0;
            W[t] = inverse[i] * r / centre;
            T[t] = 0;
        }
        SYNC();
        float rho = 1 / sigma;
        float *z = W, *y = T;
        for (int step = 1; step < degree; step++) {
            float next = 1 / (2 * sigma - rho), keep = next * rho, add = 2 * next / radius;
            EACH(t, B * M / 2) {
                int i = order[t / (M / 2)], v = t % (M / 2) * 2, n = i * M + v;
                // y held the iterate before z: their difference is the last step
                float2 az = product<float>(g, z, i, v);
                y[n] = z[n] + keep * (z[n] - y[n]) + add * inverse[i] * (R[n] - az.x);
                y[n + 1] = z[n + 1] + keep * (z[n + 1] - y[n + 1]) + add * inverse[i] * (R[n + 1] - az.y);
            }
            SYNC();
            float *other = z; z = y; y = other;
            rho = next;
        }
        float *other = z == W ? T : W;  // W is in z; T in the other
        // without null vector and X
        sums_in_chunks<BATCH>(M, B, part, few + M, [&](int v, int i) { return (null ? null[i] : flat) * (double)z[i * M + v]; });
        gram(B, X, z, (float *)0, (float *)0, (float *)0, U);
        EACH(t, M * M) Y[t] = total(U, t / M, t % M);
        SYNC();
        EACH(i, B) {
            double x[M];
            for (int a = 0; a < M; a++) x[a] = X[i * M + a];
            for (int v = 0; v < M; v++) {
                double s = z[i * M + v] - few[M + v] * (null ? null[i] : flat);
                for (int a = 0; a < M; a++) s -= Y[a * M + v] * x[a];
                z[i * M + v] = (float)s;
            }
        }
        SYNC();
        // Gram matrices of [X, W, P] (I3)
        EACH(t, B * M / 2) {
            int i = order[t / (M / 2)], v = t % (M / 2) * 2;
            *(float2 *)(other + i * M + v) = product<float>(g, z, i, v);
        }
        // no barrier here: A W is read behind those of the first product of Gram matrices
        for (int half = 0; half < 2; half++) {  // with A W, then with A P, in the same room
            // of the column block b: G (all of the basis), r^T s for X's rows, and s^T A b for the others
            const int c0 = half ? 2 * M : M;
            const float *columns = half ? P : z;
            gram(B, X, columns, z, P, columns, U);
            EACH(t, K * M) {
                int a = t / M, b = c0 + t % M;
                double s = total(U, a, t % M);
                if (a >= c0 && a < c0 + M) s = (s + total(U, b, a - c0)) / 2;
                G[a * S + b] = s;
                if (a < c0 || a >= c0 + M) G[b * S + a] = s;
            }
            SYNC();
            gram(B, R, columns, z, P, other, U);
            EACH(t, K * M) {
                int a = t / M, b = c0 + t % M;
                if (half && a >= M && a < 2 * M) continue;  // w^T A p was found as p^T A w
                double s = total(U, a, t % M);
                if (a < M) s = theta[a] * G[a * S + b] + s * error[a] * theta[a];
                if (a >= c0 && a < c0 + M) s = (s + total(U, b, a - c0)) / 2;
                H[a * S + b] = s;
                if (a < c0 || a >= c0 + M) H[b * S + a] = s;
            }
            if (!half) EACH(t, B * M / 2) {
                int i = order[t / (M / 2)], v = t % (M / 2) * 2;
                *(float2 *)(other + i * M + v) = product<float>(g, P, i, v);
            }
            SYNC();
        }
        // X with R and with itself
        gram(B, X, R, (float *)0, (float *)0, (float *)0, U);
        EACH(t, M * M) Y[t] = total(U, t / M, t % M);
        SYNC();
        gram(B, X, X, (float *)0, (float *)0, (float *)0, U);
        EACH(t, M * M) {
            int a = t / M, b = t % M;
            double s = total(U, a, b);
            G[a * S + b] = s;
            // x_a^T A x_b is theta_b x_a^T x_b + x_a^T r_b, and the other way round
            H[a * S + b] = ((theta[a] + theta[b]) * s + Y[t] * error[b] * theta[b] + Y[b * M + a] * error[a] * theta[a]) / 2;
        }
        SYNC();
        rayleigh_ritz(G, H, U, (double *)other, rot, size, Y, theta, used);
        used = K;
        EACH(i, B) {
            double x[M], s[2 * M];
            for (int v = 0; v < M; v++) { x[v] = X[i * M + v]; s[v] = z[i * M + v]; s[M + v] = P[i * M + v]; }
            for (int v = 0; v < M; v++) {
                double p = 0, q = 0;
                for (int k = 0; k < 2 * M; k++) p += s[k] * Y[(M + k) * M + v];
                for (int k = 0; k < M; k++) q += x[k] * Y[k * M + v];
                P[i * M + v] = (float)p;
                X[i * M + v] = q + p;
            }
        }
        SYNC();
    }
    // The vectors are orthogonal to float32's rounding (I3), and from here on to float64's: what is left of the lower ones in
    // each is taken out. The other way round would spoil the lower ones, whose values may be far smaller.
    gram(B, X, X, (float *)0, (float *)0, (float *)0, U);
    EACH(t, M * M) Y[t] = total(U, t / M, t % M);
    SYNC();
    EACH(v, Q) { values[(long long)graph * Q + v] = theta[v]; residual[(long long)graph * Q + v] = error[v]; }
    EACH(t, B * Q) {
        int v = t / B, i = t % B;
        double x = X[i * M + v];
        for (int a = 0; a < v; a++) x -= Y[a * M + v] / Y[a * M + a] * X[i * M + a];
        basis[((long long)graph * Q + v) * B + i] = x / sqrt(Y[v * M + v]);
    }
    EACH(i, 1) { second[graph] = theta[1]; iterations[graph] = iteration; converged[graph] = reached; }
}
