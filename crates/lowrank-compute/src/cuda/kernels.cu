// Everything of a Mixtral layer that is not a product of matrices, and the conversions of stored numbers.
//
// Compiled by nvrtc when a device is opened; needs no header. Arithmetic is f32. Matrices are row-major. Every integer
// argument is 64 bits wide. No atomics: each element of a result is written by one thread, in a fixed order of summation,
// so that the bits are the same in every run. Kernels over rows take a block per row (gridDim.x rows); kernels over
// elements take any grid.
//
// Blocks have THREADS threads, which is defined on nvrtc's command line.

typedef long long i64;
typedef unsigned short u16;

// Elements first, first + step, … of this thread.
#define FIRST ((i64)blockIdx.x * THREADS + threadIdx.x)
#define STEP ((i64)gridDim.x * THREADS)

// ---- conversions ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float of_f32(float value) { return value; }

__device__ __forceinline__ float of_bf16(u16 value) { return __uint_as_float((unsigned int)value << 16); }

// Exponent and mantissa move up by 13 bits; 2^112 corrects the bias, exactly, for subnormal numbers too.
__device__ __forceinline__ float of_f16(u16 value) {
    unsigned int magnitude = value & 0x7fffu;
    float wide = __uint_as_float(magnitude << 13) * __uint_as_float(0x77800000u);
    if (magnitude >= 0x7c00u) wide = __uint_as_float(0x7f800000u | (magnitude << 13));
    return __uint_as_float(__float_as_uint(wide) | ((unsigned int)(value & 0x8000u) << 16));
}

#define WIDEN(name, stored, wide, convert)                                                     \
    extern "C" __global__ void name(wide* out, const stored* in, i64 elements) {               \
        for (i64 i = FIRST; i < elements; i += STEP) out[i] = (wide)convert(in[i]);            \
    }
WIDEN(widen_f32_f32, float, float, of_f32)
WIDEN(widen_f16_f32, u16, float, of_f16)
WIDEN(widen_bf16_f32, u16, float, of_bf16)
WIDEN(widen_f32_f64, float, double, of_f32)
WIDEN(widen_f16_f64, u16, double, of_f16)
WIDEN(widen_bf16_f64, u16, double, of_bf16)

extern "C" __global__ void narrow_f64_f32(float* out, const double* in, i64 elements) {
    for (i64 i = FIRST; i < elements; i += STEP) out[i] = (float)in[i];
}

// To nearest, ties to even. NaN stays NaN.
extern "C" __global__ void narrow_f32_bf16(u16* out, const float* in, i64 elements) {
    for (i64 i = FIRST; i < elements; i += STEP) {
        unsigned int bits = __float_as_uint(in[i]);
        bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        out[i] = nan ? (u16)((bits >> 16) | 0x40u) : (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
}

// ---- matrices ---------------------------------------------------------------------------------------------------------

// a [size, size]: the lower triangle is copied over the upper.
#define MIRROR(name, real)                                                                     \
    extern "C" __global__ void name(real* a, i64 size) {                                       \
        for (i64 i = FIRST; i < size * size; i += STEP) {                                      \
            i64 row = i / size, col = i % size;                                                \
            if (col > row) a[i] = a[col * size + row];                                         \
        }                                                                                      \
    }
MIRROR(mirror_lower_f32, float)
MIRROR(mirror_lower_f64, double)

// a [size, size] ← scale · a + shift · I.
#define AFFINE(name, real)                                                                     \
    extern "C" __global__ void name(real* a, i64 size, real scale, real shift) {               \
        for (i64 i = FIRST; i < size * size; i += STEP)                                        \
            a[i] = scale * a[i] + (i / size == i % size ? shift : (real)0);                    \
    }
AFFINE(affine_f32, float)
AFFINE(affine_f64, double)

// out [size] = the diagonal of a [size, size].
#define DIAGONAL(name, real)                                                                   \
    extern "C" __global__ void name(real* out, const real* a, i64 size) {                      \
        for (i64 i = FIRST; i < size; i += STEP) out[i] = a[i * size + i];                     \
    }
DIAGONAL(diagonal_f32, float)
DIAGONAL(diagonal_f64, double)

// ---- rows -------------------------------------------------------------------------------------------------------------

// The sum over the block of one number per thread, for every thread.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    scratch[threadIdx.x] = value;
    __syncthreads();
    for (unsigned int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
        __syncthreads();
    }
    float total = scratch[0];
    __syncthreads();
    return total;
}

__device__ __forceinline__ float block_max(float value, float* scratch) {
    scratch[threadIdx.x] = value;
    __syncthreads();
    for (unsigned int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) scratch[threadIdx.x] = fmaxf(scratch[threadIdx.x], scratch[threadIdx.x + half]);
        __syncthreads();
    }
    float largest = scratch[0];
    __syncthreads();
    return largest;
}

// out = x / sqrt(mean(x²) + epsilon) ∘ weight; out, x [rows, width], weight [width]. A block per row.
extern "C" __global__ void rms_norm(float* out, const float* x, const float* weight, i64 width, float epsilon) {
    __shared__ float scratch[THREADS];
    const float* row = x + (i64)blockIdx.x * width;
    float squares = 0.0f;
    for (i64 i = threadIdx.x; i < width; i += THREADS) squares += row[i] * row[i];
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / (float)width + epsilon);
    for (i64 i = threadIdx.x; i < width; i += THREADS) out[(i64)blockIdx.x * width + i] = weight[i] * (row[i] * scale);
}

// Turns entry i of a head with entry i + half, by the angle of the row's position.
// x [rows, heads · 2 half]; cos, sin [positions, half]; position [rows].
extern "C" __global__ void rope(float* x, const float* cos, const float* sin, const int* position, i64 rows, i64 heads,
                                i64 half) {
    for (i64 n = FIRST; n < rows * heads * half; n += STEP) {
        i64 i = n % half, head = n / half % heads, row = n / half / heads;
        float c = cos[(i64)position[row] * half + i], s = sin[(i64)position[row] * half + i];
        float* pair = x + (row * heads + head) * 2 * half + i;
        float a = pair[0], b = pair[half];
        pair[0] = a * c - b * s;
        pair[half] = b * c + a * s;
    }
}

// Scores of one sequence become probabilities: scores [heads · queries, keys], a block per row. Row r belongs to the
// query at position i = first_query + r % queries and column c to the key at position j = first_key + c. Seen are
// i - window < j ≤ i, or all j ≤ i without a window (0); the others get 0.
extern "C" __global__ void attention_softmax(float* scores, i64 queries, i64 keys, i64 first_query, i64 first_key,
                                             i64 window, float scale) {
    __shared__ float scratch[THREADS];
    float* row = scores + (i64)blockIdx.x * keys;
    i64 i = first_query + (i64)blockIdx.x % queries;
    i64 first = window > 0 && i - window + 1 > first_key ? i - window + 1 - first_key : 0;
    i64 end = i + 1 - first_key;
    float largest = -__uint_as_float(0x7f800000u);
    for (i64 c = first + threadIdx.x; c < end; c += THREADS) largest = fmaxf(largest, row[c] * scale);
    largest = block_max(largest, scratch);
    float sum = 0.0f;
    for (i64 c = first + threadIdx.x; c < end; c += THREADS) sum += row[c] = expf(row[c] * scale - largest);
    float share = 1.0f / block_sum(sum, scratch);
    for (i64 c = threadIdx.x; c < keys; c += THREADS) row[c] = c >= first && c < end ? row[c] * share : 0.0f;
}

// ---- MoE block --------------------------------------------------------------------------------------------------------

// gate ← silu(gate) ∘ up.
extern "C" __global__ void swiglu(float* gate, const float* up, i64 elements) {
    for (i64 i = FIRST; i < elements; i += STEP) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

// out[r] = in[rows[r]]: out [count, width].
extern "C" __global__ void gather_rows(float* out, const float* in, const int* rows, i64 count, i64 width) {
    for (i64 i = FIRST; i < count * width; i += STEP) out[i] = in[(i64)rows[i / width] * width + i % width];
}

// out[rows[r]] += weights[r] · y[r]. The rows are distinct, so that no two threads meet.
extern "C" __global__ void scatter_add_rows(float* out, const float* y, const int* rows, const float* weights, i64 count,
                                            i64 width) {
    for (i64 i = FIRST; i < count * width; i += STEP) {
        i64 r = i / width;
        out[(i64)rows[r] * width + i % width] += weights[r] * y[i];
    }
}

// y += x.
extern "C" __global__ void add(float* y, const float* x, i64 elements) {
    for (i64 i = FIRST; i < elements; i += STEP) y[i] += x[i];
}
