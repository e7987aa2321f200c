// SPDX-License-Identifier: MIT OR Apache-2.0
// Products of a layer's experts with their routed tokens on the CPU, for activations in f32 and weights in f32 or bf16.
//
// Weights are packed: [ceil(out / 16), in, 16], where row o of the matrix is lane o % 16 of block o / 16. A block is read once for
// several tokens, in the order it lies in memory: decoding takes as long as reading the weights. All blocks of all experts are one
// loop, which the threads share.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
// Sums of so many tokens stay in registers.
#ifdef __AVX512F__
constexpr int ROWS = 8;
#else
constexpr int ROWS = 6;
#endif
// Inputs ahead of which weights are fetched.
constexpr int64_t AHEAD = 64;
// Tokens that a thread multiplies with a block before it takes the next block.
constexpr int64_t TOKENS = 256;
// Columns of outputs that a thread sums up.
constexpr int64_t COLUMNS = 512;

using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Shorts = uint16_t __attribute__((vector_size(2 * LANES)));

struct F32 {
    using Number = float;
    static Floats load(const float *from) {
        Floats row;
        std::memcpy(&row, from, sizeof row);
        return row;
    }
};

struct BF16 {
    using Number = uint16_t;
    static Floats load(const uint16_t *from) {
        Shorts row;
        std::memcpy(&row, from, sizeof row);
        const Words wide = __builtin_convertvector(row, Words) << 16;
        Floats floats;
        std::memcpy(&floats, &wide, sizeof floats);
        return floats;
    }
};

// y [tokens, outputs] = start + x [tokens, inputs] Wt, with row strides; `start` may be null.
struct Product {
    const void *weights;
    int64_t inputs, outputs, tokens;
    const float *x;
    int64_t x_stride;
    const float *start;
    int64_t start_stride;
    float *y;
    int64_t y_stride;
};

template <typename Kind, int rows> void multiply_rows(const Product &its, int64_t block, int64_t token) {
    const int64_t lanes = std::min(LANES, its.outputs - block * LANES);
    const auto *weights = static_cast<const typename Kind::Number *>(its.weights) + block * LANES * its.inputs;
    const float *x = its.x + token * its.x_stride;
    Floats sums[rows] = {};
    for (int row = 0; row < rows && its.start; row++)
        std::memcpy(&sums[row], its.start + (token + row) * its.start_stride + block * LANES, lanes * sizeof(float));
    for (int64_t input = 0; input < its.inputs; input++) {
        const Floats column = Kind::load(weights + input * LANES);
        __builtin_prefetch(weights + (input + AHEAD) * LANES);
        for (int row = 0; row < rows; row++)
            sums[row] += x[row * its.x_stride + input] * column;
    }
    for (int row = 0; row < rows; row++)
        std::memcpy(its.y + (token + row) * its.y_stride + block * LANES, &sums[row], lanes * sizeof(float));
}

// A function of this table multiplies as many rows as its place says.
using Multiply = void (*)(const Product &, int64_t block, int64_t token);
template <typename Kind, int... rows> constexpr std::array<Multiply, ROWS + 1> table(std::integer_sequence<int, rows...>) {
    return {nullptr, multiply_rows<Kind, rows + 1>...};
}

template <typename Kind> void multiply_block(const Product &its, int64_t block, int64_t token, int64_t end) {
    static constexpr auto multiply = table<Kind>(std::make_integer_sequence<int, ROWS>());
    // As even as can be: few rows at a time wait for the processor's additions.
    for (int64_t left = (end - token + ROWS - 1) / ROWS; left > 0; left--) {
        const int64_t rows = (end - token + left - 1) / left;
        multiply[rows](its, block, token);
        token += rows;
    }
}

struct Block {
    const Product *product;
    int64_t block, token, end;
};

template <typename Kind> void multiply_all(const std::vector<Product> &products) {
    std::vector<Block> blocks;
    for (const Product &product : products)
        for (int64_t token = 0; token < product.tokens; token += TOKENS)
            for (int64_t block = 0; block * LANES < product.outputs; block++)
                blocks.push_back({&product, block, token, std::min(token + TOKENS, product.tokens)});
#pragma omp parallel for schedule(dynamic, 8)
    for (size_t at = 0; at < blocks.size(); at++)
        multiply_block<Kind>(*blocks[at].product, blocks[at].block, blocks[at].token, blocks[at].end);
}

void multiply(int64_t kind, const std::vector<Product> &products) {
    kind == 0 ? multiply_all<F32>(products) : multiply_all<BF16>(products);
}

enum Pivots : int64_t { NONE, INPUTS, OUTPUTS };

// A matrix [outputs, inputs]: `second` alone if `rank` is 0, else second first. `order` holds the pivots first.
struct Matrix {
    int64_t inputs, outputs, rank, pivots;
    const void *first, *second;
    const int64_t *order;
};

// What a matrix multiplies: `tokens` rows of `x`, those that `from` lists, or without it the rows themselves.
struct Task {
    const Matrix *matrix;
    int64_t tokens;
    const float *x;
    const int64_t *from;
    float *y;
};

// Uninitialized, unlike a vector's.
std::unique_ptr<float[]> floats(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

// The rows that a matrix multiplies, in the order of its pivots.
void gather(const Task &task, float *rows) {
    const Matrix &its = *task.matrix;
    for (int64_t token = 0; token < task.tokens; token++) {
        const float *from = task.x + (task.from ? task.from[token] : token) * its.inputs;
        float *row = rows + token * its.inputs;
        if (its.pivots == INPUTS)
            for (int64_t input = 0; input < its.inputs; input++)
                row[input] = from[its.order[input]];
        else
            std::memcpy(row, from, its.inputs * sizeof(float));
    }
}

void run(int64_t kind, const std::vector<Task> &tasks) {
    std::vector<std::unique_ptr<float[]>> kept;
    const auto take = [&](int64_t count) { return kept.emplace_back(floats(count)).get(); };
    struct Gathered {
        const Task *task;
        float *rows;
    };
    struct Apart {
        const Task *task;
        const float *pivots, *others;
    };
    std::vector<Gathered> gathered;
    std::vector<Product> firsts, seconds;
    std::vector<Apart> aparts;
    for (const Task &task : tasks) {
        const auto [inputs, outputs, rank, pivots, first, second, order] = *task.matrix;
        const float *x = task.x;
        const auto is_same = [&](const Gathered &other) {
            return pivots != INPUTS && other.task->matrix->pivots != INPUTS && other.task->from == task.from;
        };
        if (!gathered.empty() && task.from && is_same(gathered.back())) {
            x = gathered.back().rows;
        } else if (task.from || pivots == INPUTS) {
            x = gathered.emplace_back(Gathered{&task, take(task.tokens * inputs)}).rows;
        }
        if (rank == 0) {
            seconds.push_back({second, inputs, outputs, task.tokens, x, inputs, nullptr, 0, task.y, outputs});
            continue;
        }
        float *middle = take(task.tokens * rank);
        if (pivots == INPUTS)
            firsts.push_back({first, inputs - rank, rank, task.tokens, x + rank, inputs, x, inputs, middle, rank});
        else
            firsts.push_back({first, inputs, rank, task.tokens, x, inputs, nullptr, 0, middle, rank});
        if (pivots == OUTPUTS) {
            float *others = take(task.tokens * (outputs - rank));
            seconds.push_back({second, rank, outputs - rank, task.tokens, middle, rank, nullptr, 0, others, outputs - rank});
            aparts.push_back({&task, middle, others});
        } else {
            seconds.push_back({second, rank, outputs, task.tokens, middle, rank, nullptr, 0, task.y, outputs});
        }
    }
#pragma omp parallel for schedule(dynamic)
    for (size_t at = 0; at < gathered.size(); at++)
        gather(*gathered[at].task, gathered[at].rows);
    multiply(kind, firsts);
    multiply(kind, seconds);
#pragma omp parallel for schedule(dynamic)
    for (size_t which = 0; which < aparts.size(); which++) {
        const auto [task, pivots, others] = aparts[which];
        const Matrix &its = *task->matrix;
        const int64_t apart = its.outputs - its.rank;
        for (int64_t token = 0; token < task->tokens; token++) {
            float *y = task->y + token * its.outputs;
            for (int64_t at = 0; at < its.rank; at++)
                y[its.order[at]] = pivots[token * its.rank + at];
            for (int64_t at = 0; at < apart; at++)
                y[its.order[its.rank + at]] = others[token * apart + at];
        }
    }
}

// Which tokens each expert has, in rising order: those of expert e are at starts[e] .. starts[e + 1].
struct Routing {
    std::vector<int64_t> starts, tokens;
    std::vector<float> weights;

    Routing(int64_t experts, int64_t count, int64_t slots, const int64_t *index, const float *its)
        : starts(experts + 1), tokens(count * slots), weights(its ? count * slots : 0) {
        for (int64_t at = 0; at < count * slots; at++)
            starts[index[at] + 1]++;
        for (int64_t expert = 0; expert < experts; expert++)
            starts[expert + 1] += starts[expert];
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t at = 0; at < count * slots; at++) {
            const int64_t place = next[index[at]]++;
            tokens[place] = at / slots;
            if (its)
                weights[place] = its[at];
        }
    }
};

// Each expert of this rank that has tokens: its number, its place in the routing, and how many tokens.
template <typename Act> void each_expert(const Routing &routing, const Matrix *matrices, int64_t experts, const Act &act) {
    for (int64_t expert = 0; expert < experts; expert++) {
        const int64_t start = routing.starts[expert], tokens = routing.starts[expert + 1] - start;
        if (tokens > 0 && matrices[expert].inputs > 0)
            act(expert, start, tokens);
    }
}

} // namespace

// gates [sum of an expert's tokens times its channels] and ups likewise, expert after expert; returns how many numbers each has, or
// -1 if there is no expert of some index. An expert without inputs is on another rank. x [count, hidden], index [count, slots].
extern "C" int64_t lowrank_gate_up(int64_t kind, const Matrix *gate, const Matrix *up, int64_t experts, const float *x, int64_t count,
                                   int64_t slots, const int64_t *index, float *gates, float *ups) {
    if (std::any_of(index, index + count * slots, [&](int64_t expert) { return expert < 0 || expert >= experts; }))
        return -1;
    const Routing routing(experts, count, slots, index, nullptr);
    std::vector<Task> tasks;
    int64_t at = 0;
    each_expert(routing, gate, experts, [&](int64_t expert, int64_t start, int64_t tokens) {
        tasks.push_back({&gate[expert], tokens, x, &routing.tokens[start], gates + at});
        tasks.push_back({&up[expert], tokens, x, &routing.tokens[start], ups + at});
        at += tokens * gate[expert].outputs;
    });
    run(kind, tasks);
    return at;
}

// y [count, hidden] = the weighted sum of the experts' outputs, in the order of the experts. activations: as lowrank_gate_up leaves
// gates, which has checked the index.
extern "C" void lowrank_down(int64_t kind, const Matrix *down, int64_t experts, const float *activations, int64_t count, int64_t slots,
                             const int64_t *index, const float *weights, float *y, int64_t hidden) {
    const Routing routing(experts, count, slots, index, weights);
    const auto outputs = floats(count * slots * hidden);
    std::vector<Task> tasks;
    int64_t at = 0;
    each_expert(routing, down, experts, [&](int64_t expert, int64_t start, int64_t tokens) {
        tasks.push_back({&down[expert], tokens, activations + at, nullptr, outputs.get() + start * hidden});
        at += tokens * down[expert].inputs;
    });
    run(kind, tasks);
    std::fill(y, y + count * hidden, 0.0f);
#pragma omp parallel for
    for (int64_t column = 0; column < hidden; column += COLUMNS) {
        const int64_t end = std::min(column + COLUMNS, hidden);
        each_expert(routing, down, experts, [&](int64_t, int64_t start, int64_t tokens) {
            for (int64_t place = start; place < start + tokens; place++) {
                float *sum = y + routing.tokens[place] * hidden;
                const float *from = outputs.get() + place * hidden, weight = routing.weights[place];
                for (int64_t at = column; at < end; at++)
                    sum[at] += weight * from[at];
            }
        });
    }
}
