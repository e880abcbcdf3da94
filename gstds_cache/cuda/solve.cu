// One thread block solves one graph: LOBPCG for the lowest nontrivial eigenpairs of its Laplacian.
//
// Compiled three ways from this one text: by NVRTC for the GPU at hand (what users run), by nvcc/NVRTC for named
// architectures without a GPU (registers, spills, shared memory), and by g++ with -DEMULATE, where each CUDA thread is a
// fibre and a schedule says in which order the fibres run between two barriers (tests).
//
// Letters: A Laplacian, X iterates (float64), R residuals, W preconditioned residuals, P directions (float32), T room; M vectors in the block, K = 3 M in the basis S = [X, W, P]. Blocks are [B][M]: a node's M numbers are adjacent.
//
// Invariants at the head of an iteration (I):
//   I1  X is orthogonal to the null vector (projected in float64) and S-orthonormal up to rounding; theta is ascending.
//   I2  R = A X - X theta, from a fresh product in float64; only its rounding to float32 is kept.
//   I3  W and P are float32; what they really are enters the Gram matrices (float64), so their rounding costs speed of
//       convergence at most, never accuracy: x^T A w = theta x^T w + r^T w.
//   I4  Every sum is over CHUNKS interleaved parts, each in order, then over the parts in order: the bits depend on B
//       and M and not on the number of threads, the other graphs or the schedule.
#include "block.cuh"
#ifndef M
#define M 2
#endif
#define K (3 * M)
#define BATCH (K * M < 32 ? K * M : 32)  // sums at once: part[] has room for BATCH * CHUNKS
#define DEPENDENT 1e-10
#define DEGENERATE_GAP 1e-3
#define NEGLIGIBLE 1e-30
#define MAX_SWEEPS 15

#ifdef EMULATE
#define BOUNDS
#else
#define BOUNDS __launch_bounds__(256, M <= 4 ? 2 : 1)
#endif

struct Graph { int B; const int *crow; const uint16_t *col; const float *w; const double *diag; const float *inverse;
               const double *scale; const uint16_t *order; };

// ---- products -------------------------------------------------------------------------------------------------------
template <typename F> __device__ __forceinline__ F product(const Graph &g, const F *x, int i, int v) {
    F s = 0;
    if (g.scale) {
        for (int e = g.crow[i]; e < g.crow[i + 1]; e++) s += (F)g.w[e] * (F)g.scale[g.col[e]] * x[g.col[e] * M + v];
        s *= (F)g.scale[i];
    } else {
        for (int e = g.crow[i]; e < g.crow[i + 1]; e++) s += (F)g.w[e] * x[g.col[e] * M + v];
    }
    return (F)g.diag[i] * x[i * M + v] - s;
}

// ---- the small problem: H Y = G Y diag(theta), lowest M, in a basis that may be dependent ---------------------------
// H, G [K][K] lower and upper; destroyed. Y [K][M]. All threads call; values are the same for any number of threads.
__device__ void rayleigh_ritz(double *G, double *H, double *U, double *rot, double *size, double *Y, double *theta,
                              int used) {
    EACH(a, K) size[a] = a < used && G[a * K + a] > 1e-300 ? 1 / sqrt(G[a * K + a]) : 0.0;
    SYNC();
    EACH(t, K * K) {
        int a = t / K, b = t % K;
        double s = size[a] * size[b];
        G[t] *= s;
        H[t] *= s;
    }
    SYNC();
    // Cholesky; a direction that depends on those before it (or is 0) gets row and column of the identity, and leaves.
    for (int j = 0; j < K; j++) {
        double d = G[j * K + j];  // what the ones before have left of it
        bool kept = d > DEPENDENT;
        SYNC();
        if (kept) {
            double root = sqrt(d);
            for (int i = j + TID; i < K; i += THREADS) G[i * K + j] = i == j ? root : G[i * K + j] / root;
        } else {
            for (int i = TID; i < K; i += THREADS) {
                if (i > j) G[i * K + j] = 0;
                if (i < j) G[j * K + i] = 0;
                if (i == j) { G[j * K + j] = 1; size[j] = 0; }
            }
        }
        SYNC();
        for (int t = TID; t < (K - j - 1) * (K - j - 1); t += THREADS) {
            int a = j + 1 + t / (K - j - 1), b = j + 1 + t % (K - j - 1);
            if (b <= a) G[a * K + b] -= G[a * K + j] * G[b * K + j];
        }
        SYNC();
    }
    EACH(t, K * K) {  // those that left: uncoupled, and above everything else (the scaled H has no entry beyond its trace)
        int a = t / K, b = t % K;
        if (size[a] == 0 || size[b] == 0) H[t] = a == b ? 1e30 : 0;
    }
    SYNC();
    EACH(b, K)  // H := L^-1 H
        for (int a = 0; a < K; a++) {
            double s = H[a * K + b];
            for (int k = 0; k < a; k++) s -= G[a * K + k] * H[k * K + b];
            H[a * K + b] = s / G[a * K + a];
        }
    SYNC();
    EACH(a, K)  // H := H L^-T
        for (int b = 0; b < K; b++) {
            double s = H[a * K + b];
            for (int k = 0; k < b; k++) s -= G[b * K + k] * H[a * K + k];
            H[a * K + b] = s / G[b * K + b];
        }
    SYNC();
    EACH(t, K * K) {
        int a = t / K, b = t % K;
        U[t] = a == b;
        if (a > b) { double s = (H[a * K + b] + H[b * K + a]) / 2; H[a * K + b] = s; H[b * K + a] = s; }
    }
    SYNC();
    // Cyclic Jacobi, K / 2 rotations at once (the circle method); each 2x2 block of H belongs to one task.
    for (int sweep = 0; sweep < MAX_SWEEPS; sweep++) {
        int turned = 0;
        for (int round = 0; round < K - 1; round++) {
            EACH(i, K / 2) {
                int p = i == 0 ? K - 1 : (round + i) % (K - 1), q = (round + K - 1 - i) % (K - 1);
                double a = H[p * K + q], c = 1, s = 0;
                if (a * a > NEGLIGIBLE * fabs(H[p * K + p] * H[q * K + q])) {
                    double t = (H[q * K + q] - H[p * K + p]) / (2 * a);
                    t = (t >= 0 ? 1.0 : -1.0) / (fabs(t) + sqrt(t * t + 1));
                    c = 1 / sqrt(t * t + 1);
                    s = t * c;
                    turned = 1;
                }
                rot[2 * i] = c;
                rot[2 * i + 1] = s;
            }
            SYNC();
            EACH(t, (K / 2) * (K / 2) + K * (K / 2)) {
                if (t < (K / 2) * (K / 2)) {
                    int i = t / (K / 2), j = t % (K / 2);
                    int p = i == 0 ? K - 1 : (round + i) % (K - 1), q = (round + K - 1 - i) % (K - 1);
                    int u = j == 0 ? K - 1 : (round + j) % (K - 1), v = (round + K - 1 - j) % (K - 1);
                    double ci = rot[2 * i], si = rot[2 * i + 1], cj = rot[2 * j], sj = rot[2 * j + 1];
                    double pu = H[p * K + u], pv = H[p * K + v], qu = H[q * K + u], qv = H[q * K + v];
                    double lu = ci * pu - si * qu, lv = ci * pv - si * qv, mu = si * pu + ci * qu, mv = si * pv + ci * qv;
                    H[p * K + u] = cj * lu - sj * lv;
                    H[p * K + v] = sj * lu + cj * lv;
                    H[q * K + u] = cj * mu - sj * mv;
                    H[q * K + v] = sj * mu + cj * mv;
                    if (i == j) H[p * K + v] = H[q * K + u] = si == 0 ? H[p * K + v] : 0;
                } else {
                    int r = t - (K / 2) * (K / 2), k = r / (K / 2), j = r % (K / 2);
                    int u = j == 0 ? K - 1 : (round + j) % (K - 1), v = (round + K - 1 - j) % (K - 1);
                    double cj = rot[2 * j], sj = rot[2 * j + 1], x = U[k * K + u], y = U[k * K + v];
                    U[k * K + u] = cj * x - sj * y;
                    U[k * K + v] = sj * x + cj * y;
                }
            }
            SYNC();
        }
        if (!__syncthreads_or(turned)) break;
    }
    EACH(a, K) {  // the rank of each value; equal ones by their place
        int rank = 0;
        for (int b = 0; b < K; b++) rank += H[b * K + b] < H[a * K + a] || (H[b * K + b] == H[a * K + a] && b < a);
        if (rank < M) {
            theta[rank] = H[a * K + a];
            for (int r = K - 1; r >= 0; r--) {
                double s = U[r * K + a];
                for (int k = r + 1; k < K; k++) s -= G[k * K + r] * Y[k * M + rank];
                Y[r * M + rank] = s / G[r * K + r];
            }
        }
    }
    SYNC();
    EACH(t, K * M) Y[t] *= size[t / M];
    SYNC();
}

// ---- one graph ------------------------------------------------------------------------------------------------------

// Bytes of shared memory, to the byte: the emulator puts a fence behind them.
extern "C" __host__ __device__ int fiedler_bytes(int B, int edges, int normalized) {
    int n = ROUND(B * M * 8) + ROUND(B * 8) + 3 * ROUND(K * K * 8) + 2 * ROUND(K * 8) + ROUND(K * M * 8);
    n += 2 * ROUND(M * 8) + ROUND((2 * M + 4) * 8);                  // theta, error, few
    n += 4 * ROUND(B * M * 4) + ROUND(edges * 4) + ROUND(B * 4);      // R W P T, w, inverse
    n += ROUND((B + 1) * 4) + ROUND(edges * 2) + ROUND(B * 2);        // crow, col, order
    n += normalized ? 2 * ROUND(B * 8) : 0;
    return n + ROUND(BATCH * CHUNKS * 8);
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
    int *__restrict__ converged)             // [G]: 1, or 0 at max_iterations, or -1 where the graph does not fit
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
    TAKE(double, H, K * K); TAKE(double, G, K * K); TAKE(double, U, K * K);
    TAKE(double, rot, K); TAKE(double, size, K); TAKE(double, Y, K * M);
    TAKE(double, theta, M); TAKE(double, error, M); TAKE(double, few, 2 * M + 4);
    TAKE(double, part, BATCH * CHUNKS);
    TAKE(int, crow, B + 1); TAKE(uint16_t, order, B); TAKE(float, inverse, B); TAKE(double, diag, B);
    TAKE(float, W, B * M); TAKE(float, T, B * M);
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
            EACH(t, B * M) { int i = order[t / M], v = t % M; R[i * M + v] = (float)product<double>(g, X, i, v); }
            SYNC();
            sums_in_chunks<BATCH>(2 * M * M, B, part, U, [&](int p, int i) {
                int a = p / M % M, b = p % M;
                return X[i * M + a] * (p < M * M ? X[i * M + b] : (double)R[i * M + b]);
            });
            EACH(t, K * K) {
                int a = t / K, b = t % K;
                G[t] = a < M && b < M ? U[a * M + b] : 0;
                H[t] = a < M && b < M ? (U[M * M + a * M + b] + U[M * M + b * M + a]) / 2 : 0;
            }
            SYNC();
            rayleigh_ritz(G, H, U, rot, size, Y, theta, M);
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
        EACH(t, B * M) {
            int i = order[t / M], v = t % M;
            R[i * M + v] = (float)(product<double>(g, X, i, v) - theta[v] * X[i * M + v]);
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
        const int degree = iteration <= 12 ? 4 : iteration <= 24 ? 16 : iteration <= 48 ? 48 : 96;
        const float low = iteration <= 12 ? 0.2f : iteration <= 24 ? 0.02f : iteration <= 48 ? 0.002f : 0.0005f;
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
            EACH(t, B * M) {
                int i = order[t / M], v = t % M, n = i * M + v;
                // y held the iterate before z: their difference is the last step
                y[n] = z[n] + keep * (z[n] - y[n]) + add * inverse[i] * (R[n] - product<float>(g, z, i, v));
            }
            SYNC();
            float *other = z; z = y; y = other;
            rho = next;
        }
        float *other = z == W ? T : W;  // W is in z; T in the other
        // without null vector and X
        sums_in_chunks<BATCH>(M + M * M, B, part, U, [&](int p, int i) {
            if (p < M) return (null ? null[i] : flat) * (double)z[i * M + p];
            int a = (p - M) / M, b = (p - M) % M;
            return X[i * M + a] * (double)z[i * M + b];
        });
        EACH(i, B) for (int v = 0; v < M; v++) {
            double s = z[i * M + v] - U[v] * (null ? null[i] : flat);
            for (int a = 0; a < M; a++) s -= U[M + a * M + v] * X[i * M + a];
            z[i * M + v] = (float)s;
        }
        SYNC();
        // Gram matrices of [X, W, P] (I3)
        EACH(t, B * M) { int i = order[t / M], v = t % M; other[i * M + v] = product<float>(g, z, i, v); }
        double *found = U;
        #define VEC(k, i) ((k) < M ? X[(i) * M + (k)] : (k) < 2 * M ? (double)z[(i) * M + (k) - M] : (double)P[(i) * M + (k) - 2 * M])
        for (int half = 0; half < 2; half++) {  // with A W, then with A P, in the same room
            // of the column block b: G (all of the basis), r^T s for X's rows, and s^T A b for the others
            const int c0 = half ? 2 * M : M;
            sums_in_chunks<BATCH>(K * M, B, part, found, [&](int p, int i) {
                int a = p / M, b = c0 + p % M;
                double s = VEC(b, i);
                return VEC(a, i) * s;
            });
            EACH(t, K * M) {
                int a = t / M, b = c0 + t % M;
                G[a * K + b] = found[t];
                if (a < c0 || a >= c0 + M) G[b * K + a] = found[t];
            }
            sums_in_chunks<BATCH>(K * M, B, part, found, [&](int p, int i) {
                int a = p / M, b = c0 + p % M;
                if (a < M) return (double)R[i * M + a] * VEC(b, i);
                return VEC(a, i) * (double)other[i * M + b - c0];
            });
            EACH(t, K * M) {
                int a = t / M, b = c0 + t % M;
                if (half && a >= M && a < 2 * M) continue;  // w^T A p was found as p^T A w
                double s = found[t];
                if (a < M) s = theta[a] * G[a * K + b] + s * error[a] * theta[a];
                if (a >= c0 && a < c0 + M) s = (s + found[(b) * M + a - c0]) / 2;
                H[a * K + b] = s; 
                if (a < c0 || a >= c0 + M) H[b * K + a] = s;
            }
            // no barrier here: what this writes was last read, and is next read, beyond a barrier inside sums_in_chunks()
            if (!half) EACH(t, B * M) { int i = order[t / M], v = t % M; other[i * M + v] = product<float>(g, P, i, v); }
        }
        sums_in_chunks<BATCH>(2 * M * M, B, part, found, [&](int p, int i) {
            int a = p / M % M, b = p % M;
            return X[i * M + a] * (p < M * M ? X[i * M + b] : (double)R[i * M + b]);
        });
        EACH(t, M * M) {
            int a = t / M, b = t % M;
            G[a * K + b] = found[t];
            double ab = theta[b] * found[t] + found[M * M + t] * error[b] * theta[b];
            double ba = theta[a] * found[t] + found[M * M + b * M + a] * error[a] * theta[a];
            H[a * K + b] = (ab + ba) / 2;
        }
        SYNC();
        rayleigh_ritz(G, H, U, rot, size, Y, theta, used);
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
    // sums of squares are 1 to rounding; unit length exactly enough, and out
    EACH(v, Q) { values[(long long)graph * Q + v] = theta[v]; residual[(long long)graph * Q + v] = error[v]; }
    EACH(t, B * Q) { int v = t / B, i = t % B; basis[((long long)graph * Q + v) * B + i] = X[i * M + v] / sqrt(few[v]); }
    EACH(i, 1) { second[graph] = theta[1]; iterations[graph] = iteration; converged[graph] = reached; }
}
