/* The operations between a llama-like model's matrix products in training, forward and backward, each in one pass.

moa/base/kernels/build.py compiles this file for bfloat16 (-DBF16, where the CPU multiplies it) or float32;
moa/base/kernels/llama_ops.py calls it. No row reads another row's numbers, and sums are in float32.

Shapes: B rows, T positions, N heads, D size of a head, M matrices of scores, G queries a key head sees at a position.
*/

#include "vector.h"

#define PARALLEL _Pragma("omp parallel for num_threads(threads)")

static inline float read_one(const real *from) {
#if defined(BF16)
    uint32_t bits = (uint32_t)*from << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
#else
    return *from;
#endif
}

/* The first `count` numbers as float32, followed by `padding` up to a whole vector. */
static void unpack(float *to, const real *from, int count, float padding) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) put(to + i, read(from + i));
    if (i == count) return;
    put(to + i, spread(padding));
    for (; i < count; i++) to[i] = read_one(from + i);
}

/* The first `count` numbers as they are stored; `from` has room for a whole vector more. */
static void pack(real *to, const float *from, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) write(to + i, get(from + i));
    real rest[LANES];
    if (i == count) return;
    write(rest, get(from + i));
    memcpy(to + i, rest, sizeof(real) * (count - i));
}

/* Root-mean-square norms of `rows` rows. The backward reads `factor` (rows). */
void norm_forward(real *to, float *factor, const real *x, const real *weight, int64_t rows, int size, float epsilon,
                  int threads) {
    PARALLEL
    for (int64_t row = 0; row < rows; row++) {
        const real *from = x + row * size;
        vec square = {0};
        for (int i = 0; i < size; i += LANES) square += read(from + i) * read(from + i);
        float by = factor[row] = 1 / sqrtf(sum(square) / size + epsilon);
        for (int i = 0; i < size; i += LANES) write(to + row * size + i, read(from + i) * by * read(weight + i));
    }
}

void norm_backward(real *to, const real *grad, const real *x, const float *factor, const real *weight, int64_t rows,
                   int size, int threads) {
    PARALLEL
    for (int64_t row = 0; row < rows; row++) {
        const real *from = x + row * size, *above = grad + row * size;
        vec total = {0};
        for (int i = 0; i < size; i += LANES) total += read(above + i) * read(weight + i) * read(from + i);
        float by = factor[row], back = sum(total) / size * by * by * by;
        for (int i = 0; i < size; i += LANES)
            write(to + row * size + i, read(above + i) * read(weight + i) * by - read(from + i) * back);
    }
}

/* silu(gate) * up, of `count` numbers. */
void gate_forward(real *to, const real *gate, const real *up, int64_t count, int threads) {
    PARALLEL
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = read(gate + i);
        write(to + i, x / (1.0f + exponential(-x)) * read(up + i));
    }
}

void gate_backward(real *to_gate, real *to_up, const real *grad, const real *gate, const real *up, int64_t count,
                   int threads) {
    PARALLEL
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = read(gate + i), above = read(grad + i), open = 1.0f / (1.0f + exponential(-x));
        write(to_gate + i, above * read(up + i) * open * (1.0f + x * (1.0f - open)));
        write(to_up + i, above * x * open);
    }
}

/* Rotary embedding of heads, (B, T, N, D) to (B, N, T, D); or, with `back`, its gradient the other way. cos and sin
   are (B or 1, T, D), and `step` is their distance from one row to the next. */
void rotary(real *to, const real *from, const real *cos, const real *sin, int64_t step, int rows, int length, int heads,
            int size, int back, int threads) {
    int half = size / 2;
    PARALLEL
    for (int64_t at = 0; at < (int64_t)rows * length; at++) {
        int64_t row = at / length, t = at % length;
        const real *c = cos + row * step + t * size, *s = sin + row * step + t * size;
        for (int head = 0; head < heads; head++) {
            int64_t flat = (at * heads + head) * size, turned = ((row * heads + head) * length + t) * size;
            const real *x = from + (back ? turned : flat);
            real *y = to + (back ? flat : turned);
            for (int i = 0; i < half; i += LANES) {
                vec low = read(x + i), high = read(x + half + i);
                vec cos_low = read(c + i), cos_high = read(c + half + i);
                vec sin_low = read(s + i), sin_high = read(s + half + i);
                write(y + i, back ? low * cos_low + high * sin_high : low * cos_low - high * sin_low);
                write(y + half + i, back ? high * cos_high - low * sin_low : high * cos_high + low * sin_high);
            }
        }
    }
}

/* Causal softmax of scores (M, G, T, T) times `scale`, in place. */
void softmax_forward(real *scores, int64_t matrices, int length, float scale, int threads) {
    PARALLEL
    for (int64_t row = 0; row < matrices * length; row++) {
        float x[length + LANES];
        int seen = row % length + 1, whole = (seen + LANES - 1) / LANES * LANES;
        real *place = scores + row * length;
        unpack(x, place, seen, -INFINITY);
        vec highest = get(x), total = {0};
        for (int i = LANES; i < whole; i += LANES) highest = choose(get(x + i) > highest, get(x + i), highest);
        float top = highest[0];
        for (int i = 1; i < LANES; i++) top = highest[i] > top ? highest[i] : top;
        for (int i = 0; i < whole; i += LANES) {
            vec y = exponential((get(x + i) - top) * scale);
            if (i + LANES > seen)   /* exponential() of -infinity is tiny, not zero */
                for (int lane = seen - i; lane < LANES; lane++) y[lane] = 0;
            total += y;
            put(x + i, y);
        }
        float by = 1 / sum(total);
        for (int i = 0; i < whole; i += LANES) put(x + i, get(x + i) * by);
        pack(place, x, seen);
        memset(place + seen, 0, sizeof(real) * (length - seen));
    }
}

/* Replaces the gradient of the softmax, `likely`, by the gradient of the scores. */
void softmax_backward(real *grad, const real *likely, int64_t matrices, int length, float scale, int threads) {
    PARALLEL
    for (int64_t row = 0; row < matrices * length; row++) {
        float x[length + LANES], y[length + LANES];
        int seen = row % length + 1, whole = (seen + LANES - 1) / LANES * LANES;
        real *place = grad + row * length;
        unpack(x, place, seen, 0);
        unpack(y, likely + row * length, seen, 0);
        vec total = {0};
        for (int i = 0; i < whole; i += LANES) total += get(x + i) * get(y + i);
        float mean = sum(total);
        for (int i = 0; i < whole; i += LANES) put(x + i, get(y + i) * (get(x + i) - mean) * scale);
        pack(place, x, seen);
        memset(place + seen, 0, sizeof(real) * (length - seen));
    }
}
