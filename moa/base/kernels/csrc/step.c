/* One step of decoding a llama-like model on a CPU: the next token of each row of a batch goes in, logits come out.

All layers are computed in one call and one parallel region, so that a step is bound by the bandwidth of the weights
alone. Each row has its own expert. Each output is summed by one thread in one order, whatever the number of rows: a
row's logits do not depend on the other rows of the batch.

moa/base/kernels/build.py compiles this file for bfloat16 (-DBF16, where the CPU multiplies it) or float32.
moa/mixture/generation/native.py calls it and lays out all memory that is pointed to here.

Shapes: B rows, H hidden size, I inputs and O outputs of layers side by side, P parts: those layers, R ranks, N query
heads, K key heads, G = N / K, D size of a head, T positions that a cache has room for, V words.
*/

#include "vector.h"

#define TILE (2 * LANES)               /* outputs that a thread computes at a time */
#define ROWS (LANES == 16 ? 8 : 4)     /* rows of a tile: their sums stay in registers */
#define QUERIES 4                      /* queries that are computed together */

/* Layers that read the same input. */
struct group {
    const real *weight;              /* (O / LANES, I / PAIR, LANES, PAIR) */
    const float *bias;               /* (O), or null */
    const real *a, *b;               /* (B, P * R, I) and (O / LANES, B, R, LANES), scaled; or null */
    const int32_t *part;             /* (O / LANES) the part that outputs belong to */
    int32_t inputs, outputs, parts, ranks;
};

struct layer {
    const float *before, *between;   /* (H) weights of the norms */
    struct group qkv, out, gate_up, down;
};

struct model {
    const struct layer *layers;
    const float *norm;               /* (H) */
    struct group head;
    int32_t count, hidden, heads, keys, size;   /* layers, H, N, K, D */
    float epsilon, scale;            /* of the norms, of the scores */
};

struct batch {
    float *x;                        /* (B, H) embeddings; overwritten */
    const float *cos, *sin;          /* (B, D) */
    real *keys, *values;             /* (layers, B, K, T / LANES, D / PAIR, LANES, PAIR), (layers, B, K, T, D) */
    const int32_t *lengths;          /* (B) positions of each row, with the new one */
    float *logits;                   /* (B, V) */
    real *input;                     /* (B, the widest I) scratch, as all below */
    float *output, *hidden, *scores; /* (B, the widest O), (B, the largest P * R), (B * K, G * T) */
    int32_t rows, room, threads;     /* B, T */
};

static float dot(const real *x, const real *y, int count) {
    vec total = {0};
    for (int i = 0; i < count; i += LANES * PAIR) total = merge_partial(total, x + i, y + i);
    return sum(total);
}

/* The root-mean-square norm of a row. */
static void norm(real *to, const float *x, const float *weight, int size, float epsilon) {
    vec square = {0};
    for (int i = 0; i < size; i += LANES) square += get(x + i) * get(x + i);
    float factor = 1 / sqrtf(sum(square) / size + epsilon);
    for (int i = 0; i < size; i += LANES) write(to + i, get(x + i) * factor * get(weight + i));
}

/* A times the input of row b. */
static void shrink(const struct group *group, const struct batch *batch, int b) {
    if (!group->a) return;
    int inputs = group->inputs, count = group->parts * group->ranks;
    for (int i = 0; i < count; i++)
        batch->hidden[b * count + i] = dot(group->a + ((size_t)b * count + i) * inputs,
                                           batch->input + (size_t)b * inputs, inputs);
}

/* Software prefetch of the next tile: addresses of its weights and experts, and the steps by which they advance. */
struct prefetch { const char *weight, *expert; size_t weight_step, expert_step; };

static inline void prefetch_l2(const void *from) { __builtin_prefetch(from, 0, 2); }   /* into the second-level cache */

/* A tile of outputs of a few rows, written to `to` or, with `adds`, added to it. The next tile is prefetched. */
static inline __attribute__((always_inline)) void gemm_small_batch(const struct group *group,
                                                                   const struct batch *batch, int tile, int first,
                                                                   int rows, struct prefetch next, float *to,
                                                                   int adds) {
    int inputs = group->inputs, ranks = group->ranks, at = 2 * tile;
    const real *low = group->weight + (size_t)at * LANES * inputs, *high = low + (size_t)LANES * inputs;
    const real *x = batch->input + (size_t)first * inputs;
    vec total[ROWS][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = (vec){0};
    for (int i = 0; i < inputs; i += PAIR) {
        prefetch_l2(next.weight), prefetch_l2(next.weight + 64), prefetch_l2(next.expert);
        next.weight += next.weight_step, next.expert += next.expert_step;
        for (int r = 0; r < rows; r++) {
            total[r][0] = multiply(total[r][0], low + (size_t)i * LANES, x + (size_t)r * inputs + i);
            total[r][1] = multiply(total[r][1], high + (size_t)i * LANES, x + (size_t)r * inputs + i);
        }
    }
    for (int v = 0; v < 2; v++)
        for (int r = 0; r < rows; r++) {
            int row = first + r, start = (at + v) * LANES;
            float *place = to + (size_t)row * group->outputs + start;
            vec out = total[r][v];
            if (group->bias) out += get(group->bias + start);
            if (group->a) {
                const real *b = group->b + ((size_t)(at + v) * batch->rows + row) * ranks * LANES;
                const float *hidden = batch->hidden + (row * group->parts + group->part[at + v]) * ranks;
                for (int i = 0; i < ranks; i++) out += read(b + i * LANES) * hidden[i];
            }
            put(place, adds ? out + get(place) : out);
        }
}

#define ROWS_CASE(n) case n: gemm_small_batch(group, batch, tile, first, n, next, to, adds); break;

/* Outputs of the group's layers and of each row's expert; all threads share the tiles. */
static void product(const struct group *group, const struct batch *batch, float *to, int adds) {
    int passes = (batch->rows + ROWS - 1) / ROWS, turns = group->inputs / PAIR * passes;
    size_t weights = sizeof(real) * TILE * group->inputs;
    size_t experts = group->a ? sizeof(real) * TILE * group->ranks * batch->rows : 0;
#pragma omp for schedule(static)
    for (int tile = 0; tile < group->outputs / TILE; tile++) {
        struct prefetch next = {(const char *)group->weight + (tile + 1) * weights,
                              (const char *)group->b + (tile + 1) * experts, weights / turns, experts / turns + 1};
        for (int first = 0; first < batch->rows; first += ROWS) {
            switch (batch->rows - first) {   /* constant bounds, so that the compiler unrolls the loops */
                ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3)
#if ROWS == 8
                ROWS_CASE(4) ROWS_CASE(5) ROWS_CASE(6) ROWS_CASE(7)
#endif
                default: gemm_small_batch(group, batch, tile, first, ROWS, next, to, adds);
            }
            next.weight += weights / passes, next.expert += experts / passes;
        }
    }
}

/* The rotary embedding of a head: its halves rotated by its position. */
static void rotate(real *to, const float *x, const float *cos, const float *sin, int size) {
    int half = size / 2;
    for (int i = 0; i < half; i += LANES) {
        vec one = get(x + i), other = get(x + half + i);
        write(to + i, one * get(cos + i) - other * get(sin + i));
        write(to + half + i, other * get(cos + half + i) + one * get(sin + half + i));
    }
}

/* Scores of a few queries with LANES positions; `stride` is the distance between two queries' scores. */
static inline __attribute__((always_inline)) void score(float *to, size_t stride, const real *query, const real *keys,
                                                        int size, float scale, int queries) {
    vec total[QUERIES] = {{0}};
    for (int i = 0; i < size; i += PAIR)
        for (int g = 0; g < queries; g++)
            total[g] = multiply(total[g], keys + (size_t)i * LANES, query + (size_t)g * size + i);
    for (int g = 0; g < queries; g++) put(to + g * stride, total[g] * scale);
}

/* Values weighted by the scores of a few queries, in place of the queries. */
static inline __attribute__((always_inline)) void mix(real *query, const float *scores, size_t stride,
                                                      const real *values, int size, int length,
                                                      const real *next, int queries) {
    for (int i = 0; i < size; i += TILE) {
        vec total[QUERIES][2] = {{{0}}};
        for (int t = 0; t < length; t++) {
            prefetch_l2(next + (size_t)t * size + i);
            vec low = read(values + (size_t)t * size + i), high = read(values + (size_t)t * size + i + LANES);
            for (int g = 0; g < queries; g++) {
                total[g][0] += low * scores[g * stride + t];
                total[g][1] += high * scores[g * stride + t];
            }
        }
        for (int g = 0; g < queries; g++) {
            write(query + (size_t)g * size + i, total[g][0]);
            write(query + (size_t)g * size + i + LANES, total[g][1]);
        }
    }
}

static void softmax(float *scores, int length) {
    int stop = (length + LANES - 1) / LANES * LANES;
    for (int t = length; t < stop; t++) scores[t] = -INFINITY;
    vec highest = get(scores), total = {0};
    for (int t = LANES; t < stop; t += LANES) highest = choose(get(scores + t) > highest, get(scores + t), highest);
    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = highest[i] > top ? highest[i] : top;
    for (int t = 0; t < stop; t += LANES) {
        vec x = get(scores + t), likely = choose(x == -INFINITY, (vec){0}, exponential(x - top));
        put(scores + t, likely);
        total += likely;
    }
    float by = 1 / sum(total);
    for (int t = 0; t < stop; t += LANES) put(scores + t, get(scores + t) * by);
}

/* Attention of the G query heads of one key head of one row, whose new key and value are written into the cache. */
static void attend(const struct model *model, const struct batch *batch, int layer, int b, int key) {
    int size = model->size, groups = model->heads / model->keys, length = batch->lengths[b];
    size_t room = batch->room, place = ((size_t)layer * batch->rows + b) * model->keys + key;
    const float *cos = batch->cos + (size_t)b * size, *sin = batch->sin + (size_t)b * size;
    const float *qkv = batch->output + (size_t)b * (model->heads + 2 * model->keys) * size;
    const float *value = qkv + (size_t)(model->heads + model->keys + key) * size;
    real *keys = batch->keys + place * room * size, *values = batch->values + place * room * size, fresh[size];
    rotate(fresh, qkv + (size_t)(model->heads + key) * size, cos, sin, size);
    real *column = keys + (size_t)(length - 1) / LANES * LANES * size + (length - 1) % LANES * PAIR;
    for (int i = 0; i < size; i += PAIR) memcpy(column + (size_t)i * LANES, fresh + i, PAIR * sizeof(real));
    for (int i = 0; i < size; i += LANES) write(values + (size_t)(length - 1) * size + i, get(value + i));
    for (int g = 0, count; g < groups; g += count) {
        count = groups - g >= QUERIES ? QUERIES : groups - g;
        float *scores = batch->scores + (((size_t)b * model->keys + key) * groups + g) * room;
        real *query = batch->input + ((size_t)b * model->heads + key * groups + g) * size;   /* then the result */
        for (int i = 0; i < count; i++)
            rotate(query + (size_t)i * size, qkv + (size_t)(key * groups + g + i) * size, cos, sin, size);
#define QUERIES_CASE(n) case n: \
        for (int t = 0; t < length; t += LANES) { \
            for (int i = 0; i < LANES * size; i += 64 / sizeof(real)) prefetch_l2(values + (size_t)t * size + i); \
            score(scores + t, room, query, keys + (size_t)t * size, size, model->scale, n); \
        } \
        for (int i = 0; i < n; i++) softmax(scores + i * room, length); \
        mix(query, scores, room, values, size, length, keys + room * size, n); \
        break;
        switch (count) { QUERIES_CASE(1) QUERIES_CASE(2) QUERIES_CASE(3) QUERIES_CASE(4) }
    }
}

/* silu(gate) * up of row b. */
static void activate(const struct batch *batch, int b, int size) {
    const float *gate = batch->output + (size_t)b * 2 * size, *up = gate + size;
    for (int i = 0; i < size; i += LANES) {
        vec x = get(gate + i);
        write(batch->input + (size_t)b * size + i, x / (1.0f + exponential(-x)) * get(up + i));
    }
}

/* The norm of the hidden state, as the group's input; all threads share the rows. */
static void normalise(const struct model *model, const struct batch *batch, const float *weight,
                      const struct group *group) {
    int size = model->hidden;
#pragma omp for
    for (int b = 0; b < batch->rows; b++) {
        norm(batch->input + (size_t)b * size, batch->x + (size_t)b * size, weight, size, model->epsilon);
        shrink(group, batch, b);
    }
}

int lanes(void) { return LANES; }

void step(const struct model *model, const struct batch *batch) {
#pragma omp parallel num_threads(batch->threads)
    {
        for (int at = 0; at < model->count; at++) {
            const struct layer *layer = model->layers + at;
            normalise(model, batch, layer->before, &layer->qkv);
            product(&layer->qkv, batch, batch->output, 0);
#pragma omp for collapse(2) schedule(dynamic, 1)
            for (int b = 0; b < batch->rows; b++)
                for (int key = 0; key < model->keys; key++) attend(model, batch, at, b, key);
            if (layer->out.a) {
#pragma omp for
                for (int b = 0; b < batch->rows; b++) shrink(&layer->out, batch, b);
            }
            product(&layer->out, batch, batch->x, 1);
            normalise(model, batch, layer->between, &layer->gate_up);
            product(&layer->gate_up, batch, batch->output, 0);
#pragma omp for
            for (int b = 0; b < batch->rows; b++) {
                activate(batch, b, layer->down.inputs);
                shrink(&layer->down, batch, b);
            }
            product(&layer->down, batch, batch->x, 1);
        }
        normalise(model, batch, model->norm, &model->head);
        product(&model->head, batch, batch->logits, 0);
    }
}
