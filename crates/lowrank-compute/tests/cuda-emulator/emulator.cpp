// A CUDA device made of nothing but the CPU: the functions of libcuda, nvrtc, cuBLAS and cuSOLVER that the GPU code calls,
// each a plain, slow definition, and kernels.cu itself compiled as C++.
//
// Copies from and to pinned memory are put off until somebody waits for them or works on their stream, so that whoever reuses
// pinned memory too early copies the wrong numbers.
//
// It lets the whole GPU path run on a machine without a GPU: which kernel is launched with which arguments, in which
// order, with which dimensions and transposes; that no kernel writes beyond its buffers; that a full device memory is
// survived. It says nothing about speed, about the hardware's rounding, or about threads that race.
//
// `cargo xtask gpu-check --emulate` builds it and runs the suite on it. LOWRANK_EMULATED_BYTES bounds the device's memory.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <setjmp.h>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

// ---- the execution model ----------------------------------------------------------------------------------------------
// Blocks run one after another. Threads of a block that meet at __syncthreads are fibers; each runs up to the next barrier
// before the first of them goes on.

#define THREADS 256
struct Dim {
    unsigned int x;
};
static Dim threadIdx, blockIdx, gridDim;

static jmp_buf scheduler, fibers[THREADS];
static char stacks[THREADS][32 << 10];
static bool started[THREADS], finished[THREADS];
static bool in_fiber = false;

// Back to the scheduler, until it resumes this fiber.
static void pause() {
    if (!_setjmp(fibers[threadIdx.x])) _longjmp(scheduler, 1);
}

static void barrier() {
    if (!in_fiber) {
        fprintf(stderr, "emulator: __syncthreads in a kernel that is not run by fibers\n");
        abort();
    }
    pause();
}

#define __global__ static
#define __device__ static
#define __forceinline__ inline
#define __shared__ static
#define __syncthreads barrier
static inline float __uint_as_float(unsigned int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned int __float_as_uint(float value) {
    unsigned int bits;
    memcpy(&bits, &value, 4);
    return bits;
}
// kernels.cu without `extern "C"`, which C++ does not have beside `static`.
#include "kernels.inc"

// ---- kernels by name ---------------------------------------------------------------------------------------------------

using Call = void (*)(void**);
template <auto function> struct Caller;
template <class... A, void (*function)(A...)> struct Caller<function> {
    template <size_t... i> static void spread(void** arguments, std::index_sequence<i...>) {
        function(*static_cast<A*>(arguments[i])...);
    }
    static void call(void** arguments) { spread(arguments, std::index_sequence_for<A...>()); }
};
struct Kernel {
    Call call;
    bool meets; // its threads wait for each other
};
static const std::map<std::string, Kernel> kernels = {
#define KERNEL(name, meets) {#name, {Caller<name>::call, meets}}
    KERNEL(widen_f32_f32, false),   KERNEL(widen_f16_f32, false),    KERNEL(widen_bf16_f32, false),
    KERNEL(widen_f32_f64, false),   KERNEL(widen_f16_f64, false),    KERNEL(widen_bf16_f64, false),
    KERNEL(narrow_f64_f32, false),  KERNEL(narrow_f32_bf16, false),  KERNEL(mirror_lower_f32, false),
    KERNEL(affine_f32, false),      KERNEL(affine_f64, false),       KERNEL(diagonal_f32, false),
    KERNEL(diagonal_f64, false),
    KERNEL(mirror_lower_f64, false), KERNEL(rms_norm, true),         KERNEL(rope, false),
    KERNEL(attention_softmax, true), KERNEL(swiglu, false),          KERNEL(gather_rows, false),
    KERNEL(scatter_add_rows, false), KERNEL(add, false),
};

static Call running;
static void** running_arguments;
// A fiber is made once and runs its thread of one block after another.
static void fiber_main() {
    for (;;) {
        running(running_arguments);
        finished[threadIdx.x] = true;
        pause();
    }
}

static void resume(unsigned int t) {
    static ucontext_t start;
    threadIdx.x = t;
    if (_setjmp(scheduler)) return;
    if (started[t]) _longjmp(fibers[t], 1);
    started[t] = true;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks[t];
    start.uc_stack.ss_size = sizeof stacks[t];
    makecontext(&start, fiber_main, 0);
    setcontext(&start);
}

static void run_block_of_fibers() {
    in_fiber = true;
    std::fill(finished, finished + THREADS, false);
    for (bool alive = true; alive;) {
        alive = false;
        for (unsigned int t = 0; t < THREADS; t++) {
            if (finished[t]) continue;
            resume(t);
            alive |= !finished[t];
        }
    }
    in_fiber = false;
}

// ---- libcuda ------------------------------------------------------------------------------------------------------------

using u64 = unsigned long long;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };

// Every allocation lies between two fences; whoever breaks one is named when the allocation is freed.
static const size_t FENCE = 256;
static const unsigned char FENCE_BYTE = 0xab, FRESH_BYTE = 0xff; // all ones is NaN: reading what was not written shows
static std::mutex memory_lock, launch_lock;
static std::map<u64, size_t> memory;
static size_t memory_used = 0;

static size_t memory_limit() {
    const char* limit = getenv("LOWRANK_EMULATED_BYTES");
    return limit ? strtoull(limit, nullptr, 10) : (size_t)4 << 30;
}
static int allocate(u64* pointer, size_t bytes) {
    std::lock_guard<std::mutex> guard(memory_lock);
    if (bytes == 0) return INVALID_VALUE;
    if (memory_used + bytes > memory_limit()) return OUT_OF_MEMORY;
    auto* base = static_cast<unsigned char*>(aligned_alloc(FENCE, (bytes + 3 * FENCE - 1) / FENCE * FENCE));
    memset(base, FENCE_BYTE, FENCE);
    memset(base + FENCE, FRESH_BYTE, bytes);
    memset(base + FENCE + bytes, FENCE_BYTE, FENCE);
    *pointer = reinterpret_cast<u64>(base + FENCE);
    memory[*pointer] = bytes;
    memory_used += bytes;
    return OK;
}
static int release(u64 pointer) {
    std::lock_guard<std::mutex> guard(memory_lock);
    auto found = memory.find(pointer);
    if (found == memory.end()) {
        fprintf(stderr, "emulator: freed what was not allocated\n");
        abort();
    }
    auto* data = reinterpret_cast<unsigned char*>(pointer);
    for (size_t i = 0; i < FENCE; i++) {
        if (data[-(long)FENCE + (long)i] != FENCE_BYTE || data[found->second + i] != FENCE_BYTE) {
            fprintf(stderr, "emulator: something was written outside of a buffer of %zu bytes\n", found->second);
            abort();
        }
    }
    memory_used -= found->second;
    memory.erase(found);
    free(data - FENCE);
    return OK;
}
// A copy must lie within one allocation.
static void within(u64 pointer, size_t bytes, const char* what) {
    std::lock_guard<std::mutex> guard(memory_lock);
    auto next = memory.upper_bound(pointer);
    if (next == memory.begin() || (--next, pointer + bytes > next->first + next->second)) {
        fprintf(stderr, "emulator: %s of %zu bytes leaves its buffer\n", what, bytes);
        abort();
    }
}

// ---- streams: copies of pinned memory that are still to come, in order ------------------------------------------------------

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};
struct Stream {
    std::deque<Copy> waiting;
    u64 asked = 0, done = 0;
};
struct Event {
    Stream* stream = nullptr;
    u64 after = 0;
};
static std::mutex streams_lock;
static std::map<u64, size_t> pinned;

static bool is_pinned(const void* from, size_t bytes) {
    auto next = pinned.upper_bound(reinterpret_cast<u64>(from));
    return next != pinned.begin() && (--next, reinterpret_cast<u64>(from) + bytes <= next->first + next->second);
}
// Everything up to the copy with this number.
static void catch_up(Stream* stream, u64 number = ~0ull) {
    std::lock_guard<std::mutex> guard(streams_lock);
    for (; stream && stream->done < number && !stream->waiting.empty(); stream->done++) {
        Copy& copy = stream->waiting.front();
        memcpy(copy.to, copy.from, copy.bytes);
        stream->waiting.pop_front();
    }
}
static void copy(void* to, const void* from, size_t bytes, const void* on_host, void* stream_handle) {
    auto* stream = static_cast<Stream*>(stream_handle);
    {
        std::lock_guard<std::mutex> guard(streams_lock);
        if (is_pinned(on_host, bytes)) {
            stream->waiting.push_back({to, from, bytes});
            stream->asked++;
            return;
        }
    }
    catch_up(stream);
    memcpy(to, from, bytes);
}

static thread_local void* current = nullptr;
static int the_context, the_pool;
API int cuInit(unsigned) { return OK; }
API int cuDeviceGetCount(int* count) { return *count = 1, OK; }
API int cuDeviceGet(int* device, int) { return *device = 0, OK; }
API int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &the_context, OK; }
API int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
API int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1; // compute capability 9.0; memory pools
    return OK;
}
API int cuDeviceGetName(char* name, int length, int) { return snprintf(name, length, "emulated device"), OK; }
API int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = memory_limit(), OK; }
API int cuDeviceGetDefaultMemPool(void** pool, int) { return *pool = &the_pool, OK; }
API int cuMemPoolSetAttribute(void*, int, void*) { return OK; }
API int cuMemGetInfo_v2(size_t* free, size_t* total) {
    return *total = memory_limit(), *free = *total - memory_used, OK;
}
API int cuCtxGetCurrent(void** context) { return *context = current, OK; }
API int cuCtxSetCurrent(void* context) { return current = context, OK; }
API int cuCtxSynchronize() { return OK; }
API int cuStreamCreate(void** stream, unsigned) { return *stream = new Stream, OK; }
API int cuStreamDestroy_v2(void* stream) {
    // Events outlive it, as they may: what is left of it stays.
    return catch_up(static_cast<Stream*>(stream)), OK;
}
API int cuStreamSynchronize(void* stream) { return catch_up(static_cast<Stream*>(stream)), current ? OK : 201; }
API int cuEventCreate(void** event, unsigned) { return *event = new Event, current ? OK : 201; }
API int cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), OK; }
API int cuEventRecord(void* event, void* stream) {
    std::lock_guard<std::mutex> guard(streams_lock);
    auto* on = static_cast<Stream*>(stream);
    return *static_cast<Event*>(event) = {on, on->asked}, OK;
}
API int cuEventSynchronize(void* event) {
    auto* waited = static_cast<Event*>(event);
    return catch_up(waited->stream, waited->after), current ? OK : 201;
}
API int cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    std::lock_guard<std::mutex> guard(streams_lock);
    *pointer = memset(malloc(bytes), FRESH_BYTE, bytes);
    return pinned[reinterpret_cast<u64>(*pointer)] = bytes, current ? OK : 201;
}
API int cuMemFreeHost(void* pointer) {
    std::lock_guard<std::mutex> guard(streams_lock);
    if (!pinned.erase(reinterpret_cast<u64>(pointer))) return INVALID_VALUE;
    return free(pointer), OK;
}
API int cuGetErrorString(int, const char** text) { return *text = "emulated error", OK; }
API int cuMemAllocAsync(u64* pointer, size_t bytes, void*) { return allocate(pointer, bytes); }
API int cuMemFreeAsync(u64 pointer, void* stream) { return catch_up(static_cast<Stream*>(stream)), release(pointer); }
API int cuMemsetD8Async(u64 pointer, unsigned char value, size_t bytes, void* stream) {
    catch_up(static_cast<Stream*>(stream));
    within(pointer, bytes, "a memset");
    return memset(reinterpret_cast<void*>(pointer), value, bytes), OK;
}
API int cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, void* stream) {
    within(to, bytes, "a copy to the device");
    return copy(reinterpret_cast<void*>(to), from, bytes, from, stream), OK;
}
API int cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, void* stream) {
    within(from, bytes, "a copy from the device");
    return copy(to, reinterpret_cast<void*>(from), bytes, to, stream), OK;
}
API int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, void* stream) {
    catch_up(static_cast<Stream*>(stream));
    within(from, bytes, "a copy on the device");
    within(to, bytes, "a copy on the device");
    return memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes), OK;
}
API int cuModuleLoadData(void** module, const void*) { return *module = &the_pool, OK; }
API int cuModuleUnload(void*) { return OK; }
API int cuModuleGetFunction(void** function, void*, const char* name) {
    auto found = kernels.find(name);
    if (found == kernels.end()) return NOT_FOUND;
    *function = const_cast<Kernel*>(&found->second);
    return OK;
}
API int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned, void* stream, void** arguments, void**) {
    if (!current) return 201;
    catch_up(static_cast<Stream*>(stream));
    if (gx == 0 || gy != 1 || gz != 1 || bx != THREADS || by != 1 || bz != 1) return INVALID_VALUE;
    std::lock_guard<std::mutex> guard(launch_lock);
    auto* kernel = static_cast<Kernel*>(function);
    running = kernel->call;
    running_arguments = arguments;
    gridDim.x = gx;
    for (blockIdx.x = 0; blockIdx.x < gx; blockIdx.x++) {
        if (kernel->meets) {
            run_block_of_fibers();
        } else {
            for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++) running(arguments);
        }
    }
    return OK;
}

// ---- nvrtc --------------------------------------------------------------------------------------------------------------

static const char CODE[] = "emulated";
API int nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*, const char* const*) {
    return *program = malloc(1), 0;
}
API int nvrtcDestroyProgram(void** program) { return free(*program), *program = nullptr, 0; }
API int nvrtcCompileProgram(void*, int count, const char* const* options) {
    for (int i = 0; i < count; i++)
        if (!strcmp(options[i], "-DTHREADS=256")) return 0;
    return 6;
}
API int nvrtcGetProgramLogSize(void*, size_t* size) { return *size = sizeof CODE, 0; }
API int nvrtcGetProgramLog(void*, char* log) { return memcpy(log, CODE, sizeof CODE), 0; }
API int nvrtcGetCUBINSize(void*, size_t* size) { return *size = sizeof CODE, 0; }
API int nvrtcGetCUBIN(void*, char* code) { return memcpy(code, CODE, sizeof CODE), 0; }
API int nvrtcGetPTXSize(void*, size_t* size) { return *size = sizeof CODE, 0; }
API int nvrtcGetPTX(void*, char* code) { return memcpy(code, CODE, sizeof CODE), 0; }

// ---- cuBLAS: columns ----------------------------------------------------------------------------------------------------

// A handle of either library is the place of its stream.
static int make_handle(void** handle) { return *handle = new Stream*(nullptr), 0; }
static int drop_handle(void* handle) { return delete static_cast<Stream**>(handle), 0; }
static int set_stream(void* handle, void* stream) { return *static_cast<Stream**>(handle) = static_cast<Stream*>(stream), 0; }
static void begin(void* handle) { catch_up(*static_cast<Stream**>(handle)); }
API int cublasCreate_v2(void** handle) { return make_handle(handle); }
API int cublasDestroy_v2(void* handle) { return drop_handle(handle); }
API int cublasSetStream_v2(void* handle, void* stream) { return set_stream(handle, stream); }

enum { R_32F = 0, R_64F = 1, R_16BF = 14, COMPUTE_32F = 68, COMPUTE_64F = 70 };
static size_t size_of(int type) { return type == R_64F ? 8 : type == R_32F ? 4 : 2; }
static double load(const void* base, int type, long long index) {
    if (type == R_64F) return static_cast<const double*>(base)[index];
    if (type == R_32F) return static_cast<const float*>(base)[index];
    return of_bf16(static_cast<const unsigned short*>(base)[index]);
}

API int cublasGemmStridedBatchedEx(void* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* A,
                                   int Atype, int lda, long long strideA, const void* B, int Btype, int ldb,
                                   long long strideB, const void* beta, void* C, int Ctype, int ldc, long long strideC,
                                   int batch, int compute, int) {
    begin(handle);
    bool types = (Atype == R_32F && Btype == R_32F && Ctype == R_32F && compute == COMPUTE_32F) ||
                 (Atype == R_16BF && Btype == R_16BF && Ctype == R_32F && compute == COMPUTE_32F) ||
                 (Atype == R_64F && Btype == R_64F && Ctype == R_64F && compute == COMPUTE_64F);
    if (!types || m < 0 || n < 0 || k < 0 || lda < std::max(1, transa ? k : m) || ldb < std::max(1, transb ? n : k) ||
        ldc < std::max(1, m))
        return 7;
    bool wide = compute == COMPUTE_64F;
    double a1 = wide ? *static_cast<const double*>(alpha) : *static_cast<const float*>(alpha);
    double b1 = wide ? *static_cast<const double*>(beta) : *static_cast<const float*>(beta);
    for (long long at = 0; at < batch; at++) {
        auto* a = static_cast<const char*>(A) + at * strideA * (long long)size_of(Atype);
        auto* b = static_cast<const char*>(B) + at * strideB * (long long)size_of(Btype);
        auto* c = static_cast<char*>(C) + at * strideC * (long long)size_of(Ctype);
        std::vector<double> left((size_t)m * k);
        for (long long i = 0; i < m; i++)
            for (long long l = 0; l < k; l++)
                left[i * k + l] = load(a, Atype, transa ? i * lda + l : l * lda + i);
        std::vector<double> column(k);
        for (long long j = 0; j < n; j++) {
            for (long long l = 0; l < k; l++) column[l] = load(b, Btype, transb ? l * ldb + j : j * ldb + l);
            for (long long i = 0; i < m; i++) {
                double sum = 0;
                for (long long l = 0; l < k; l++) sum += left[i * k + l] * column[l];
                sum *= a1;
                if (b1 != 0) sum += b1 * load(c, Ctype, j * ldc + i);
                if (wide)
                    reinterpret_cast<double*>(c)[j * ldc + i] = sum;
                else
                    reinterpret_cast<float*>(c)[j * ldc + i] = (float)sum;
            }
        }
    }
    return 0;
}

template <class T>
static int syrk(int uplo, int trans, int n, int k, const T* alpha, const T* A, int lda, const T* beta, T* C, int ldc) {
    if (lda < std::max(1, trans ? k : n) || ldc < std::max(1, n)) return 7;
    for (long long j = 0; j < n; j++) {
        for (long long i = uplo == 1 ? 0 : j; i < (uplo == 1 ? j + 1 : n); i++) {
            double sum = 0;
            for (long long l = 0; l < k; l++)
                sum += trans ? (double)A[i * lda + l] * A[j * lda + l] : (double)A[l * lda + i] * A[l * lda + j];
            C[j * ldc + i] = (T)(*alpha * sum + (*beta != 0 ? *beta * C[j * ldc + i] : 0));
        }
    }
    return 0;
}
API int cublasSsyrk_v2(void* handle, int uplo, int trans, int n, int k, const float* alpha, const float* A, int lda,
                       const float* beta, float* C, int ldc) {
    begin(handle);
    return syrk(uplo, trans, n, k, alpha, A, lda, beta, C, ldc);
}
API int cublasDsyrk_v2(void* handle, int uplo, int trans, int n, int k, const double* alpha, const double* A, int lda,
                       const double* beta, double* C, int ldc) {
    begin(handle);
    return syrk(uplo, trans, n, k, alpha, A, lda, beta, C, ldc);
}

// ---- cuSOLVER: columns --------------------------------------------------------------------------------------------------

API int cusolverDnCreate(void** handle) { return make_handle(handle); }
API int cusolverDnDestroy(void* handle) { return drop_handle(handle); }
API int cusolverDnSetStream(void* handle, void* stream) { return set_stream(handle, stream); }
API int cusolverDnCreateParams(void** params) { return *params = malloc(1), 0; }
API int cusolverDnDestroyParams(void* params) { return free(params), 0; }

static const size_t WORKSPACE = 4096;
API int cusolverDnXsyevd_bufferSize(void*, void*, int, int, long long, int, const void*, long long, int, const void*, int,
                                    size_t* device, size_t* host) {
    return *device = WORKSPACE, *host = WORKSPACE + 1, 0;
}
// Cyclic Jacobi rotations.
template <class T> static int eigen(bool vectors, bool upper, long long n, T* A, long long lda, T* W) {
    std::vector<long double> a(n * n), v(n * n, 0.0);
    for (long long j = 0; j < n; j++)
        for (long long i = 0; i < n; i++) {
            bool swap = upper ? i > j : i < j;
            a[j * n + i] = swap ? A[i * lda + j] : A[j * lda + i];
        }
    for (long long i = 0; i < n; i++) v[i * n + i] = 1;
    for (int sweep = 0; sweep < 60; sweep++) {
        long double off = 0, all = 0;
        for (long long i = 0; i < n * n; i++) all += a[i] * a[i], off += i / n != i % n ? a[i] * a[i] : 0;
        if (!(off > 1e-36 * all)) break;
        for (long long p = 0; p < n; p++)
            for (long long q = p + 1; q < n; q++) {
                long double apq = a[q * n + p];
                if (apq == 0) continue;
                long double theta = (a[q * n + q] - a[p * n + p]) / (2 * apq);
                long double t = (theta >= 0 ? 1 : -1) / (fabsl(theta) + sqrtl(theta * theta + 1));
                long double c = 1 / sqrtl(t * t + 1), s = t * c;
                for (long long i = 0; i < n; i++) {
                    long double x = a[p * n + i], y = a[q * n + i];
                    a[p * n + i] = c * x - s * y, a[q * n + i] = s * x + c * y;
                }
                for (long long i = 0; i < n; i++) {
                    long double x = a[i * n + p], y = a[i * n + q];
                    a[i * n + p] = c * x - s * y, a[i * n + q] = s * x + c * y;
                }
                for (long long i = 0; i < n; i++) {
                    long double x = v[p * n + i], y = v[q * n + i];
                    v[p * n + i] = c * x - s * y, v[q * n + i] = s * x + c * y;
                }
            }
    }
    std::vector<long long> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](long long x, long long y) { return a[x * n + x] < a[y * n + y]; });
    for (long long j = 0; j < n; j++) {
        W[j] = (T)a[order[j] * n + order[j]];
        // Without vectors, the matrix is left in a state that nobody may rely on.
        for (long long i = 0; i < n; i++) A[j * lda + i] = vectors ? (T)v[order[j] * n + i] : (T)NAN;
    }
    return 0;
}
API int cusolverDnXsyevd(void* handle, void*, int jobz, int uplo, long long n, int typeA, void* A, long long lda, int typeW,
                         void* W, int compute, void*, size_t device, void* host, size_t host_bytes, int* info) {
    if (n < 1 || lda < n || typeA != typeW || typeA != compute || device < WORKSPACE || host_bytes < WORKSPACE + 1) return 3;
    begin(handle);
    memset(host, 0, host_bytes);
    *info = typeA == R_64F ? eigen(jobz == 1, uplo == 1, n, static_cast<double*>(A), lda, static_cast<double*>(W))
                           : eigen(jobz == 1, uplo == 1, n, static_cast<float*>(A), lda, static_cast<float*>(W));
    return 0;
}

// LAPACK's geqrf and orgqr, column by column: H_j = I − tau_j v vᵀ with v_j = 1 and the rest below the diagonal.
template <class T> static int geqrf(int m, int n, T* A, int lda, T* tau, int* info) {
    for (long long j = 0; j < n; j++) {
        T* x = A + j * lda;
        double norm = 0;
        for (long long i = j + 1; i < m; i++) norm += (double)x[i] * x[i];
        tau[j] = 0;
        if (norm > 0) {
            double alpha = x[j], beta = -std::copysign(std::sqrt(alpha * alpha + norm), alpha);
            tau[j] = (T)((beta - alpha) / beta);
            for (long long i = j + 1; i < m; i++) x[i] = (T)(x[i] / (alpha - beta));
            x[j] = (T)beta;
        }
        for (long long c = j + 1; c < n; c++) {
            T* y = A + c * lda;
            double dot = y[j];
            for (long long i = j + 1; i < m; i++) dot += (double)x[i] * y[i];
            y[j] = (T)(y[j] - tau[j] * dot);
            for (long long i = j + 1; i < m; i++) y[i] = (T)(y[i] - tau[j] * dot * x[i]);
        }
    }
    return *info = 0;
}
template <class T> static int orgqr(int m, int n, int k, T* A, int lda, const T* tau, int* info) {
    std::vector<double> q((size_t)m * n, 0.0);
    for (long long c = 0; c < n; c++) {
        double* y = &q[c * m];
        y[c] = 1;
        for (long long j = k - 1; j >= 0; j--) {
            const T* x = A + j * lda;
            double dot = y[j];
            for (long long i = j + 1; i < m; i++) dot += x[i] * y[i];
            y[j] -= tau[j] * dot;
            for (long long i = j + 1; i < m; i++) y[i] -= tau[j] * dot * x[i];
        }
    }
    for (long long c = 0; c < n; c++)
        for (long long i = 0; i < m; i++) A[c * lda + i] = (T)q[c * m + i];
    return *info = 0;
}
#define QR(S, T)                                                                                                        \
    API int cusolverDn##S##geqrf_bufferSize(void*, int, int n, T*, int, int* size) { return *size = n, 0; }            \
    API int cusolverDn##S##orgqr_bufferSize(void*, int, int n, int, const T*, int, const T*, int* size) {              \
        return *size = n + 1, 0;                                                                                        \
    }                                                                                                                   \
    API int cusolverDn##S##geqrf(void* handle, int m, int n, T* A, int lda, T* tau, T*, int size, int* info) {          \
        begin(handle);                                                                                                  \
        return lda < m || size < n ? 3 : geqrf(m, n, A, lda, tau, info);                                                \
    }                                                                                                                   \
    API int cusolverDn##S##orgqr(void* handle, int m, int n, int k, T* A, int lda, const T* tau, T*, int size,          \
                                  int* info) {                                                                          \
        begin(handle);                                                                                                  \
        return lda < m || size < n + 1 || n > m || k > n ? 3 : orgqr(m, n, k, A, lda, tau, info);                       \
    }
QR(S, float)
QR(D, double)
