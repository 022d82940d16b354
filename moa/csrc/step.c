/* One step of decoding a llama-like model on a CPU: the next token of each row of a batch goes in, logits come out.

All layers in one call and one parallel region, so that what a step costs is the weights' way from memory and nothing
else. Each row has its own expert. An output is summed by one thread in one order, however many rows stand beside its
own: a row's logits do not depend on its neighbours.

Compiled by moa/native.py, for bfloat16 (-DBF16, where the CPU multiplies it) or float32; driven by moa/compiled.py, which
lays out everything that is pointed to here.

Shapes: B rows, H hidden size, I inputs and O outputs of layers side by side, P parts: those layers, R ranks, N query
heads, K key heads, G = N / K, D size of a head, T positions that a cache has room for, V words.
*/

#include "vector.h"

#define TILE (2 * LANES)             /* outputs that are computed together */
#define ROWS (LANES == 16 ? 8 : 4)   /* rows that are: sums of a tile stay in registers */

/* Layers that read the same input. */
struct group {
    const real *weight;              /* (O / TILE, I / PAIR, TILE, PAIR) */
    const float *bias;               /* (O), or null */
    const real *a, *b;               /* (B, P * R, I) and (B, R, O), scaled; or null */
    const int32_t *part;             /* (O / TILE) the part that outputs belong to */
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
    float *x;                        /* (B, H) embeddings in; not needed after */
    const float *cos, *sin;          /* (B, D) */
    real *columns;                   /* (layers, B, 2 * K, T, D) keys, then values */
    const int32_t *first;            /* (B) each row's first position that is a token */
    float *logits;                   /* (B, V) */
    real *input;                     /* (B, the widest I) scratch, as all below */
    float *output, *hidden, *scores; /* (B, the widest O), (B, the largest P * R), (B * K, G * T) */
    int32_t rows, length, room, threads;   /* B; positions, the new one included; T */
};

static float dot(const real *x, const real *y, int count) {
    vec total = {0};
    for (int i = 0; i < count; i += LANES * PAIR) total = meet(total, x + i, y + i);
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
    int count = group->parts * group->ranks;
    const real *a = group->a + (size_t)b * count * group->inputs;
    for (int i = 0; i < count; i++)
        batch->hidden[b * count + i] = dot(a + (size_t)i * group->inputs, batch->input + (size_t)b * group->inputs,
                                           group->inputs);
}

/* TILE outputs of a few rows, from `first` on: in place of what stands there, or added to it. */
static inline __attribute__((always_inline)) void few(const struct group *group, const struct batch *batch, int tile,
                                                      int first, int rows, float *to, int adds) {
    int inputs = group->inputs, outputs = group->outputs, start = tile * TILE;
    const real *weight = group->weight + (size_t)start * inputs, *x = batch->input + (size_t)first * inputs;
    vec low[ROWS], high[ROWS];
    for (int r = 0; r < rows; r++) low[r] = high[r] = (vec){0};
    for (int i = 0; i < inputs; i += PAIR, weight += TILE * PAIR)
        for (int r = 0; r < rows; r++) {
            low[r] = multiply(low[r], weight, x + (size_t)r * inputs + i);
            high[r] = multiply(high[r], weight + LANES * PAIR, x + (size_t)r * inputs + i);
        }
    for (int r = 0; r < rows; r++) {
        size_t row = first + r;
        if (group->bias) low[r] += get(group->bias + start), high[r] += get(group->bias + start + LANES);
        if (group->a) {
            const real *b = group->b + row * group->ranks * outputs + start;
            const float *hidden = batch->hidden + (row * group->parts + group->part[tile]) * group->ranks;
            for (int i = 0; i < group->ranks; i++, b += outputs)
                low[r] += read(b) * hidden[i], high[r] += read(b + LANES) * hidden[i];
        }
        float *place = to + row * outputs + start;
        if (adds) low[r] += get(place), high[r] += get(place + LANES);
        put(place, low[r]);
        put(place + LANES, high[r]);
    }
}

/* What the group's layers and each row's expert make of the input; all threads share it. */
static void product(const struct group *group, const struct batch *batch, float *to, int adds) {
#pragma omp for schedule(dynamic, 2)
    for (int tile = 0; tile < group->outputs / TILE; tile++)
        for (int first = 0; first < batch->rows; first += ROWS)
            switch (batch->rows - first) {
                case 1: few(group, batch, tile, first, 1, to, adds); break;
                case 2: few(group, batch, tile, first, 2, to, adds); break;
                case 3: few(group, batch, tile, first, 3, to, adds); break;
#if ROWS == 8
                case 4: few(group, batch, tile, first, 4, to, adds); break;
                case 5: few(group, batch, tile, first, 5, to, adds); break;
                case 6: few(group, batch, tile, first, 6, to, adds); break;
                case 7: few(group, batch, tile, first, 7, to, adds); break;
#endif
                default: few(group, batch, tile, first, ROWS, to, adds);
            }
}

/* A head turned by its position. */
static void turn(real *to, const float *x, const float *cos, const float *sin, int size) {
    int half = size / 2;
    for (int i = 0; i < half; i += LANES) {
        vec one = get(x + i), other = get(x + half + i);
        write(to + i, one * get(cos + i) - other * get(sin + i));
        write(to + half + i, other * get(cos + half + i) + one * get(sin + half + i));
    }
}

/* The G query heads of one key head of one row; its new key and value are put into the last column. */
static void attend(const struct model *model, const struct batch *batch, int layer, int b, int key) {
    int size = model->size, groups = model->heads / model->keys, length = batch->length, first = batch->first[b];
    const float *cos = batch->cos + (size_t)b * size, *sin = batch->sin + (size_t)b * size;
    const float *qkv = batch->output + (size_t)b * (model->heads + 2 * model->keys) * size;
    real *keys = batch->columns + (((size_t)layer * batch->rows + b) * 2 * model->keys + key) * batch->room * size;
    real *values = keys + (size_t)model->keys * batch->room * size;
    const float *value = qkv + (size_t)(model->heads + model->keys + key) * size;
    turn(keys + (size_t)(length - 1) * size, qkv + (size_t)(model->heads + key) * size, cos, sin, size);
    for (int i = 0; i < size; i += LANES) write(values + (size_t)(length - 1) * size + i, get(value + i));
    for (int g = 0; g < groups; g++) {
        float *scores = batch->scores + ((size_t)b * model->keys + key) * groups * batch->room + (size_t)g * batch->room;
        real *query = batch->input + ((size_t)b * model->heads + key * groups + g) * size;   /* its result goes there */
        turn(query, qkv + (size_t)(key * groups + g) * size, cos, sin, size);
        float highest = -INFINITY;
        for (int t = first; t < length; t++) {
            scores[t] = dot(query, keys + (size_t)t * size, size) * model->scale;
            highest = scores[t] > highest ? scores[t] : highest;
        }
        float total = 0;
        for (int t = first; t < length; t += LANES) {
            vec some = {0};
            int count = length - t < LANES ? length - t : LANES;
            memcpy(&some, scores + t, 4 * count);
            some = exponential(some - highest);
            memcpy(scores + t, &some, 4 * count);
        }
        for (int t = first; t < length; t++) total += scores[t];
        for (int i = 0; i < size; i += LANES) {
            vec mixed = {0};
            for (int t = first; t < length; t++) mixed += read(values + (size_t)t * size + i) * scores[t];
            write(query + i, mixed / total);
        }
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

int lanes(void) { return LANES; }

void step(const struct model *model, const struct batch *batch) {
    int hidden = model->hidden;
#pragma omp parallel num_threads(batch->threads)
    {
        for (int at = 0; at < model->count; at++) {
            const struct layer *layer = model->layers + at;
#pragma omp for
            for (int b = 0; b < batch->rows; b++) {
                norm(batch->input + (size_t)b * hidden, batch->x + (size_t)b * hidden, layer->before, hidden,
                     model->epsilon);
                shrink(&layer->qkv, batch, b);
            }
            product(&layer->qkv, batch, batch->output, 0);
#pragma omp for collapse(2) schedule(dynamic, 1)
            for (int b = 0; b < batch->rows; b++)
                for (int key = 0; key < model->keys; key++) attend(model, batch, at, b, key);
            if (layer->out.a) {
#pragma omp for
                for (int b = 0; b < batch->rows; b++) shrink(&layer->out, batch, b);
            }
            product(&layer->out, batch, batch->x, 1);
#pragma omp for
            for (int b = 0; b < batch->rows; b++) {
                norm(batch->input + (size_t)b * hidden, batch->x + (size_t)b * hidden, layer->between, hidden,
                     model->epsilon);
                shrink(&layer->gate_up, batch, b);
            }
            product(&layer->gate_up, batch, batch->output, 0);
#pragma omp for
            for (int b = 0; b < batch->rows; b++) {
                activate(batch, b, layer->down.inputs);
                shrink(&layer->down, batch, b);
            }
            product(&layer->down, batch, batch->x, 1);
        }
#pragma omp for
        for (int b = 0; b < batch->rows; b++)
            norm(batch->input + (size_t)b * hidden, batch->x + (size_t)b * hidden, model->norm, hidden, model->epsilon);
        product(&model->head, batch, batch->logits, 0);
    }
}
