/* Vectors of float32 over numbers that are stored in bfloat16 (-DBF16, where the CPU multiplies it) or in float32. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(BF16)
#include <immintrin.h>
#define LANES 16
#define PAIR 2                       /* inputs of one multiply-add instruction */
typedef uint16_t real;               /* a number as it is stored */
#elif defined(__AVX512F__)
#define LANES 16
#define PAIR 1
typedef float real;
#else
#define LANES 8
#define PAIR 1
typedef float real;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

/* spread: x in all lanes. choose: x in the lanes of `where`, y in the others. get and put: at any float32 address. */
static inline vec spread(float x) { return x - (vec){0}; }
static inline vec choose(ivec where, vec x, vec y) { return (vec)((where & (ivec)x) | (~where & (ivec)y)); }
static inline vec get(const float *from) { return *(const loose *)from; }
static inline void put(float *to, vec x) { *(loose *)to = x; }

static inline float sum(vec x) {
    typedef float half __attribute__((vector_size(2 * LANES)));
    typedef float quarter __attribute__((vector_size(LANES)));
    half two[2];
    memcpy(two, &x, sizeof x);
    two[0] += two[1];
    quarter four[2];
    memcpy(four, two, sizeof four);
    four[0] += four[1];
    float total = 0;
    for (int i = 0; i < LANES / 4; i++) total += four[0][i];
    return total;
}

#if defined(BF16)
static inline vec read(const real *from) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16);
}
static inline void write(real *to, vec x) { _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
/* total + w times x: LANES groups of PAIR numbers at w, each times the same PAIR numbers at x. */
static inline vec multiply(vec total, const real *w, const real *x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(pair));
}
/* total + x times y: LANES groups of PAIR numbers at x and at y. The sum of the lanes is a dot product. */
static inline vec merge_partial(vec total, const real *x, const real *y) {
    return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(y));
}
#else
static inline vec read(const real *from) { return get(from); }
static inline void write(real *to, vec x) { put(to, x); }
static inline vec multiply(vec total, const real *w, const real *x) { return total + get(w) * *x; }
static inline vec merge_partial(vec total, const real *x, const real *y) { return total + get(x) * get(y); }
#endif

/* e to the x, with a relative error of 2e-7: powers of two times a polynomial, as in Cephes' expf. */
static inline vec exponential(vec x) {
    x = choose(x < -87.0f, spread(-87.0f), x);
    x = choose(x > 88.0f, spread(88.0f), x);
    vec whole = x * 1.44269504f + 12582912.0f - 12582912.0f;   /* adding this rounds to the nearest integer */
    vec rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    vec y = spread(1.98756915e-4f);
    y = y * rest + 1.39819995e-3f;
    y = y * rest + 8.33345205e-3f;
    y = y * rest + 4.16657962e-2f;
    y = y * rest + 0.166666657f;
    y = y * rest + 0.5f;
    y = y * rest * rest + rest + 1.0f;
    return y * (vec)((__builtin_convertvector(whole, ivec) + 127) << 23);
}
