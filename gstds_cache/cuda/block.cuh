// What kernels of one thread block a graph share. EMULATE is defined where g++ compiles the same text for a CPU (tests).
//
// Sums are taken in one order, whatever the number of threads: CHUNKS interleaved parts, each in order, then the parts in
// order. No atomics, no shuffles: a kernel without races gives the same bits for every schedule of its threads.
#pragma once
#ifdef EMULATE
#include "emulate.h"
#else
#define SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]
typedef unsigned short uint16_t;
#endif

#define TID ((int)threadIdx.x)
#define THREADS ((int)blockDim.x)
#define EACH(i, n) for (int i = TID; i < (n); i += THREADS)
#define SYNC() __syncthreads()
#define ROUND(bytes) (((bytes) + 15) / 16 * 16)
#define CHUNKS 32

// n sums over the nodes, BATCH at once: the p-th, of f(p, i) over i < B, goes to out[p]. part: room for BATCH * CHUNKS.
template <int BATCH, typename Term>
__device__ __forceinline__ void sums_in_chunks(int n, int B, double *part, double *out, Term f) {
    for (int base = 0; base < n; base += BATCH) {
        int here = n - base < BATCH ? n - base : BATCH;
        EACH(t, here * CHUNKS) {
            int c = t % CHUNKS, p = t / CHUNKS;
            double s = 0;
            for (int i = c; i < B; i += CHUNKS) s += f(base + p, i);
            part[t] = s;
        }
        SYNC();
        EACH(p, here) {
            double s = 0;
            for (int c = 0; c < CHUNKS; c++) s += part[p * CHUNKS + c];
            out[base + p] = s;
        }
        SYNC();
    }
}
