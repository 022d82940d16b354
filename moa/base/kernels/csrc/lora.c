/* The product of each row's expert with a linear layer's input in training, forward and backward.

Products whose inner size is a rank are too narrow for a library's matrix product, which spends its time on packing.
Here each number is read once, in float32, from the stack of experts, and each row's gradient is added to its own
expert's. Each output is summed by one thread in one order, so results do not depend on the number of threads.

moa/base/kernels/build.py compiles this file for inputs in bfloat16 (-DBF16, where the CPU multiplies it) or float32;
moa/experts/lora_autograd.py calls it.

Shapes: E experts, R ranks, I inputs and O outputs of the layer, B rows, T positions.
*/

#include "vector.h"

/* A tile has RANKS ranks and PLACES positions, or WIDE vectors of a gradient: its sums stay in registers. */
#define RANKS (LANES == 16 ? 8 : 4)
#define PLACES 2
#define WIDE 2
#define CHUNK 8                       /* positions that a thread takes at a time */
#define PARALLEL _Pragma("omp parallel for schedule(dynamic, 1) num_threads(threads)")

struct lora {
    const float *a, *b, *scale;        /* (E, R, I), (E, O, R), (E) */
    const int64_t *rows;               /* (B) the expert of each row */
    const uint8_t *inactive;           /* (B) rows without an expert; or null */
    const real *x;                     /* (B, T, I) */
    float *hidden, *flipped;           /* (B, T, R) scaled; (B, R, O) scratch */
    float *to_a, *to_b;                /* gradients of a and b, which this adds to; or null */
    int64_t a_step, b_step, to_a_step, to_b_step;   /* distance from one expert to the next */
    int32_t batch, length, inputs, outputs, ranks, threads;
};

static int is_inactive(const struct lora *l, int row) { return l->inactive && l->inactive[row]; }

/* The first row of the batch with this row's expert. */
static int first_like(const struct lora *l, int row) {
    for (int i = 0; i < row; i++)
        if (!is_inactive(l, i) && l->rows[i] == l->rows[row]) return i;
    return row;
}

/* Transpose B of each expert in the batch to (R, O), at the place of its first row. */
static void transpose(const struct lora *l) {
    int threads = l->threads, blocks = (l->outputs + 255) / 256;
    PARALLEL
    for (int at = 0; at < l->batch * blocks; at++) {
        int row = at / blocks, start = at % blocks * 256, stop = start + 256 < l->outputs ? start + 256 : l->outputs;
        if (is_inactive(l, row) || first_like(l, row) != row) continue;
        const float *b = l->b + l->rows[row] * l->b_step;
        float *to = l->flipped + (int64_t)row * l->ranks * l->outputs;
        for (int r = 0; r < l->ranks; r++)
            for (int o = start; o < stop; o++) to[(int64_t)r * l->outputs + o] = b[(int64_t)o * l->ranks + r];
    }
}

/* to (places, R) = scale * x (places, size) times m (R, size), for `ranks` of its R = `all` ranks. */
static inline __attribute__((always_inline)) void shrink_ranks(float *to, const float *m, const real *x, int size,
                                                               int all, float scale, int places, int ranks) {
    vec total[PLACES][RANKS] = {{{0}}};
    for (int i = 0; i < size; i += LANES)
        for (int p = 0; p < places; p++) {
            vec here = read(x + (int64_t)p * size + i);
            for (int r = 0; r < ranks; r++) total[p][r] += here * get(m + (int64_t)r * size + i);
        }
    for (int p = 0; p < places; p++)
        for (int r = 0; r < ranks; r++) to[p * all + r] = sum(total[p][r]) * scale;
}

static void shrink(float *to, const float *m, const real *x, int size, int ranks, float scale, int places) {
    for (int r = 0; r < ranks; r += RANKS) {
        const float *own = m + (int64_t)r * size;
        if (places == PLACES && ranks - r >= RANKS)   /* constant bounds: the compiler unrolls */
            shrink_ranks(to + r, own, x, size, ranks, scale, PLACES, RANKS);
        else
            for (int p = 0; p < places; p++)
                for (int k = r; k < ranks && k < r + RANKS; k++)
                    shrink_ranks(to + p * ranks + k, m + (int64_t)k * size, x + (int64_t)p * size, size, ranks, scale,
                                 1, 1);
    }
}

/* y (places, size) += h (places, R) times m (R, size). */
static void expand(real *y, const float *m, const float *h, int size, int ranks, int places) {
    for (int i = 0; i < size; i += LANES) {
        vec one = read(y + i), other = places == PLACES ? read(y + size + i) : one;
        const float *next = places == PLACES ? h + ranks : h;
        for (int r = 0; r < ranks; r++) {
            vec here = get(m + (int64_t)r * size + i);
            one += here * h[r];
            other += here * next[r];
        }
        write(y + i, one);
        if (places == PLACES) write(y + size + i, other);
    }
}

/* h (B, T, R) = scale * `from` times A or, with `back`, times the transposed B. Then h times the other matrix is added
   to `to`, unless `to` is null. */
static void low_rank(const struct lora *l, float *h, const real *from, int from_size, real *to, int to_size, int back) {
    int threads = l->threads, chunks = (l->length + CHUNK - 1) / CHUNK;
    transpose(l);
    PARALLEL
    for (int at = 0; at < l->batch * chunks; at++) {
        int row = at / chunks, start = at % chunks * CHUNK;
        int stop = start + CHUNK < l->length ? start + CHUNK : l->length;
        if (is_inactive(l, row)) continue;
        const float *a = l->a + l->rows[row] * l->a_step;
        const float *b = l->flipped + (int64_t)first_like(l, row) * l->ranks * l->outputs;
        for (int places; start < stop; start += places) {
            int64_t t = (int64_t)row * l->length + start;
            places = stop - start < PLACES ? stop - start : PLACES;
            float *own = h + t * l->ranks;
            shrink(own, back ? b : a, from + t * from_size, from_size, l->ranks, l->scale[l->rows[row]], places);
            if (to) expand(to + t * to_size, back ? a : b, own, to_size, l->ranks, places);
        }
    }
}

/* y (B, T, O) += scale * B(Ax); the backward reads `hidden`. */
void lora_forward(const struct lora *l, real *y) { low_rank(l, l->hidden, l->x, l->inputs, y, l->outputs, 0); }

/* For each expert, the sum over its rows of h (T, R) times z (T, size), added to its gradient: (R, size), or its
   transpose. This computes `ranks` ranks from r on and `count` vectors of columns from `column` on. */
static inline __attribute__((always_inline)) void gradient_tile(const struct lora *l, float *to, int64_t step,
                                                                const float *h, const real *z, int size,
                                                                int64_t column, int transposed, int r, int ranks,
                                                                int count) {
    for (int first = 0; first < l->batch; first++) {
        if (is_inactive(l, first) || first_like(l, first) != first) continue;
        vec total[RANKS][WIDE] = {{{0}}};
        for (int64_t row = first; row < l->batch; row++) {
            if (is_inactive(l, row) || l->rows[row] != l->rows[first]) continue;
            const float *own = h + row * l->length * l->ranks + r;
            const real *from = z + row * l->length * size + column;
            for (int t = 0; t < l->length; t++, own += l->ranks, from += size)
                for (int w = 0; w < count; w++) {
                    vec here = read(from + w * LANES);
                    for (int k = 0; k < ranks; k++) total[k][w] += here * own[k];
                }
        }
        float *grad = to + l->rows[first] * step;
        for (int k = 0; k < ranks; k++)
            for (int w = 0; w < count; w++) {
                int64_t at = column + w * LANES;
                if (!transposed) {
                    float *place = grad + (int64_t)(r + k) * size + at;
                    put(place, get(place) + total[k][w]);
                } else
                    for (int lane = 0; lane < LANES; lane++) grad[(at + lane) * l->ranks + r + k] += total[k][w][lane];
            }
    }
}

static void gradient(const struct lora *l, float *to, int64_t step, const float *h, const real *z, int size, int column,
                     int transposed) {
    for (int r = 0; r < l->ranks; r += RANKS)
        if (l->ranks - r >= RANKS && size - column >= WIDE * LANES)   /* constant bounds: the compiler unrolls */
            gradient_tile(l, to, step, h, z, size, column, transposed, r, RANKS, WIDE);
        else
            for (int k = r; k < l->ranks && k < r + RANKS; k++)
                for (int at = column; at < size && at < column + WIDE * LANES; at += LANES)
                    gradient_tile(l, to, step, h, z, size, at, transposed, k, 1, 1);
}

/* Add to the gradients of the input (B, T, I), unless `to_x` is null, and of the experts, given the output's gradient
   (B, T, O). `back` is scratch, (B, T, R). */
void lora_backward(const struct lora *l, const real *grad, real *to_x, float *back) {
    int threads = l->threads, wide = WIDE * LANES;
    low_rank(l, back, grad, l->outputs, to_x, l->inputs, 1);
    int of_a = l->to_a ? (l->inputs + wide - 1) / wide : 0, of_b = l->to_b ? (l->outputs + wide - 1) / wide : 0;
    PARALLEL
    for (int at = 0; at < of_a + of_b; at++)
        if (at < of_a)
            gradient(l, l->to_a, l->to_a_step, back, l->x, l->inputs, at * wide, 0);
        else
            gradient(l, l->to_b, l->to_b_step, l->hidden, grad, l->outputs, (at - of_a) * wide, 1);
}
