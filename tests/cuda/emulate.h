// A kernel's text as C++, for tests without a GPU. Two ways to run a block's threads:
//
//   fibres (default)         between two barriers they run one after the other, in the order that a schedule says; a
//                            kernel without races gives the same bits for every schedule
//   EMULATE_THREADS          real threads and a real barrier, for ThreadSanitizer, which reports what no barrier orders,
//                            whatever the values are
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
using std::fabs; using std::fmax; using std::fmin; using std::sqrt;
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define SHARED_MEMORY(name) char *name = emulated_memory
struct Dim { int x, y, z; };
static char *emulated_memory;

#ifdef EMULATE_THREADS
#include <atomic>
#include <barrier>
#include <memory>
#include <thread>
static thread_local Dim threadIdx;
static Dim blockIdx, blockDim, gridDim;
static std::unique_ptr<std::barrier<>> emulated_barrier;
static std::atomic<int> emulated_or[3];
static thread_local int emulated_turn;
static void __syncthreads() { emulated_barrier->arrive_and_wait(); }
static int __syncthreads_or(int x) {
    int slot = emulated_turn++ % 3;
    emulated_or[slot] |= x;
    emulated_or[(slot + 1) % 3] = 0;
    __syncthreads();
    int any = emulated_or[slot];
    __syncthreads();
    return any;
}
template <typename Body> static int emulated_block(int threads, int, Body body) {
    for (auto &o : emulated_or) o = 0;
    emulated_barrier = std::make_unique<std::barrier<>>(threads);
    std::vector<std::thread> all;
    for (int t = 0; t < threads; t++) all.emplace_back([=] { threadIdx.x = t; emulated_turn = 0; body(); });
    for (auto &t : all) t.join();
    return 0;
}
static long emulated_barriers() { return 0; }
#else
#include <csetjmp>
#include <functional>
#include <ucontext.h>
static Dim threadIdx, blockIdx, blockDim, gridDim;
// A context gives a fibre its stack; from then on jumps, which make no system calls, go to and fro.
struct Fibre { ucontext_t entry; jmp_buf at; std::vector<char> stack; bool begun, done; long barriers; };
static std::vector<Fibre> fibres;
static jmp_buf scheduler;
static std::function<void()> emulated_body;
__attribute__((noinline)) static void emulated_resume(Fibre *fibre) {
    if (_setjmp(scheduler)) return;
    if (fibre->begun) _longjmp(fibre->at, 1);
    fibre->begun = true;
    setcontext(&fibre->entry);
}
__attribute__((noinline)) static void emulated_pause(Fibre *fibre) {
    if (!_setjmp(fibre->at)) _longjmp(scheduler, 1);
}
static void __syncthreads() {
    int me = threadIdx.x;
    fibres[me].barriers++;
    if (blockDim.x > 1) emulated_pause(&fibres[me]);
}
static int emulated_or[2];  // the barrier's number tells which: the other is cleared meanwhile
static long emulated_cleared;
static int __syncthreads_or(int x) {
    long number = fibres[threadIdx.x].barriers;
    int slot = (int)(number / 2 % 2);
    if (emulated_cleared != number) { emulated_cleared = number; emulated_or[slot] = 0; }
    emulated_or[slot] |= x;
    __syncthreads();
    int any = emulated_or[slot];
    __syncthreads();
    return any;
}
static void emulated_enter() {
    int me = threadIdx.x;
    emulated_body();
    fibres[me].done = true;
    _longjmp(scheduler, 1);
}
static uint64_t emulated_state;
static int emulated_random(int n) {
    emulated_state ^= emulated_state << 13; emulated_state ^= emulated_state >> 7; emulated_state ^= emulated_state << 17;
    return (int)(emulated_state % (uint64_t)n);
}
// schedule 0 ascending, 1 descending, 2 shuffled anew at each barrier. 0, or 1 where threads stop at different barriers.
template <typename Body> static int emulated_block(int threads, int schedule, Body body) {
    emulated_body = body;
    emulated_cleared = -1;
    emulated_state = 88172645463325252ull;
    if ((int)fibres.size() < threads) fibres.resize(threads);
    std::vector<int> order(threads);
    for (int t = 0; t < threads; t++) {
        Fibre &f = fibres[t];
        f.begun = f.done = false; f.barriers = 0;
        f.stack.resize(256 << 10);
        getcontext(&f.entry);
        f.entry.uc_stack.ss_sp = f.stack.data(); f.entry.uc_stack.ss_size = f.stack.size(); f.entry.uc_link = nullptr;
        makecontext(&f.entry, emulated_enter, 0);
        order[t] = schedule == 1 ? threads - 1 - t : t;
    }
    for (int left = threads; left;) {
        if (schedule == 2) for (int t = threads - 1; t > 0; t--) std::swap(order[t], order[emulated_random(t + 1)]);
        for (int t : order) {
            if (fibres[t].done) continue;
            threadIdx.x = t;
            emulated_resume(&fibres[t]);
            if (fibres[t].done) left--;
        }
        for (int t = 0; t < threads; t++)  // all at the same barrier, or all at the end
            if (fibres[t].barriers != fibres[0].barriers || (left && fibres[t].done)) return 1;
    }
    return 0;
}
static long emulated_barriers() { return fibres[0].barriers; }
#endif

template <typename... A, size_t... I> static void emulated_call(void (*f)(A...), void **a, std::index_sequence<I...>) {
    f(*static_cast<A *>(a[I])...);
}
// What cuLaunchKernel does, one block after the other. Shared memory is filled with NaN, and has a fence behind it. 0, or
// 1 where threads stop at different barriers, 2 where a block wrote beyond its shared memory, 3 for wrong arguments.
template <typename... A>
static int emulated_launch(void (*f)(A...), int grid, int threads, int shared, int schedule, int count, void **a, long *barriers) {
    const int fence = 64;
    if (count != (int)sizeof...(A)) return 3;
    std::vector<char> room(shared + 16 + fence);
    emulated_memory = (char *)(((uintptr_t)room.data() + 15) / 16 * 16);
    blockDim = {threads, 1, 1};
    gridDim = {grid, 1, 1};
    *barriers = 0;
    for (int block = 0; block < grid; block++) {
        std::memset(emulated_memory, 0xFF, shared);
        std::memset(emulated_memory + shared, 0x5A, fence);
        blockIdx = {block, 0, 0};
        if (emulated_block(threads, schedule, [=] { emulated_call(f, a, std::index_sequence_for<A...>()); })) return 1;
        *barriers += emulated_barriers();
        for (int i = 0; i < fence; i++) if (emulated_memory[shared + i] != 0x5A) return 2;
    }
    return 0;
}
