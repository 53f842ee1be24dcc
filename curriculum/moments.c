/* The four numbers of every row of a tile of logits, in one visit: the "native" backend of `curriculum.moments`.

   A row of some thousand floats stays in the first-level cache between the search for its maximum and the sums, so the
   logits are fetched once. Torch's operations, and the kernels torch.compile makes of them, fetch them two to nine times.

   Sums run in LANES interleaved partial sums whatever the width of the machine's vectors: the compiler lays the lanes
   into registers, and the order of additions is the same everywhere. Made to be compiled with -ffinite-math-only (without
   it gcc turns the clamp into masked branches, 1.6 times slower); as that promises the compiler that there are no NaNs,
   they are looked for among the bits. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 32 };
static const float LOWEST = -3.40282347e38f; /* a maximum that can be subtracted, also from -inf */
static const float LEAST = -86.0f;           /* e^-86 < 1e-37: beside the maximum's e^0 = 1 it is nothing */

static inline int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* e^y for LEAST <= y <= 0, to 2e-7 of its value: 2^t with t = n + r, n whole and |r| <= 1/2. The polynomial is the one
   of degree 5 with the least relative error on [-1/2, 1/2] (8e-8), fitted at Chebyshev nodes. */
static inline float exp_of(float y) {
    const float t = y * 1.44269504f;
    const float n = t + 12582912.0f; /* 1.5 * 2^23: the whole part lands in the lowest bits */
    const float r = t - (n - 12582912.0f);
    float p = 0.0013266979925282809f;
    p = p * r + 0.009675469395438596f;
    p = p * r + 0.055507426754066516f;
    p = p * r + 0.24022121576227307f;
    p = p * r + 0.6931469490692175f;
    p = p * r + 1.0000000710651666f;
    return float_of(bits_of(p) + (int32_t)((uint32_t)bits_of(n) << 23)); /* times 2^n: n is added to the exponent */
}

/* Of each row of `logits` its maximum m (at least LOWEST) and, with y = max(logit - m, LEAST), the sums of e^y, y e^y and
   y^2 e^y, written to rows 0 to 3 of `out`. `stride` and `out_stride` count floats; a row has room for a whole number of
   LANES. With a cap c > 0 the logits are first replaced by x / sqrt(1 + x^2 / c^2); without one, a logit may be -inf. NaN
   or +inf in a row makes its sums NaN. */
void reduce_rows(float *logits, int64_t rows, int64_t columns, int64_t stride, float cap, float *out, int64_t out_stride) {
    const int64_t whole = (columns + LANES - 1) / LANES * LANES;
    const float inverse = cap > 0 ? 1 / cap : 0;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float *x = logits + i * stride;
        float m[LANES], s[LANES] = {0}, a[LANES] = {0}, b[LANES] = {0};
        int32_t broken[LANES] = {0};
        for (int l = 0; l < LANES; l++) m[l] = LOWEST;
        if (cap > 0)
            for (int64_t j = 0; j < columns; j++) {
                const float scaled = x[j] * inverse;
                x[j] /= sqrtf(1 + scaled * scaled);
            }
        for (int64_t j = columns; j < whole; j++) x[j] = LOWEST; /* takes no part */
        for (int64_t j = 0; j < whole; j += LANES)
            for (int l = 0; l < LANES; l++) {
                const int32_t bits = bits_of(x[j + l]);
                m[l] = x[j + l] > m[l] ? x[j + l] : m[l];
                broken[l] |= (bits & 0x7fffffff) >= 0x7f800000 && bits != (int32_t)0xff800000; /* -inf is welcome */
            }
        for (int l = 1; l < LANES; l++) {
            m[0] = m[l] > m[0] ? m[l] : m[0];
            broken[0] |= broken[l];
        }
        for (int64_t j = 0; j < whole; j += LANES)
            for (int l = 0; l < LANES; l++) {
                float y = x[j + l] - m[0];
                y = y > LEAST ? y : LEAST;
                const float e = exp_of(y), ye = y * e;
                s[l] += e, a[l] += ye, b[l] += y * ye;
            }
        for (int l = 1; l < LANES; l++) s[0] += s[l], a[0] += a[l], b[0] += b[l];
        if (broken[0]) s[0] = a[0] = b[0] = float_of(0x7fc00000);
        out[i] = m[0], out[out_stride + i] = s[0], out[2 * out_stride + i] = a[0], out[3 * out_stride + i] = b[0];
    }
}
