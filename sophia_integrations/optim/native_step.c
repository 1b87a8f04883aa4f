/* One Sophia step over a list of tensors: `reference_step` in float32, every coordinate read and written once.
 *
 * Without contraction or reassociation a coordinate's result is the same in a vector, in its tail and on any processor,
 * so it depends neither on the number of threads nor on where the list is cut between them.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { FLOAT32, BFLOAT16 };
enum { NON_FINITE, UNCLIPPED, CURVED, COUNTS };
enum { MAX_THREADS = 64, BLOCK = 4096 };

#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef struct {
    uint64_t param, grad, exp_avg, hessian; /* addresses */
    int64_t size, param_type, grad_type, exp_avg_type;
} Tensor;

typedef struct {
    float beta1, one_minus_beta1, sign; /* sign: -1 to maximize */
    float ahead, ahead_grad;            /* the update follows ahead * m + ahead_grad * g */
    float rho, noise, eps;              /* the scales of the bias corrections are in them */
    float momentum_scale, decay, lr;    /* decay: 1 - lr * weight_decay */
    uint32_t seed;                      /* of the rounding of a bfloat16 m */
} Rule;

typedef struct {
    const Tensor *tensors;
    const Rule *rule;
    int64_t first, last, counts[COUNTS]; /* elements of the concatenated list */
    int counting;
} Range;

ALWAYS_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

ALWAYS_INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

ALWAYS_INLINE float load(const void *x, int64_t i, int type) {
    return type == FLOAT32 ? ((const float *)x)[i] : float_of((uint32_t)((const uint16_t *)x)[i] << 16);
}

/* To bfloat16: to the nearest, ties to even; a NaN stays one. */
ALWAYS_INLINE void store(void *x, int64_t i, float value, int type) {
    if (type == FLOAT32) {
        ((float *)x)[i] = value;
    } else {
        uint32_t bits = bits_of(value);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        ((uint16_t *)x)[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
    }
}

/* `rounded_to_bfloat16`: up or down by chance, by bits that are a hash of the value. */
ALWAYS_INLINE uint16_t rounded_by_chance(float value, uint32_t seed) {
    uint32_t bits = bits_of(value), noise = bits ^ seed;
    noise = (noise ^ (noise >> 16)) * 0x85ebca6b;
    noise = (noise ^ (noise >> 13)) * 0xc2b2ae35;
    noise ^= noise >> 16;
    return (uint16_t)((bits + (noise & 0xffff)) >> 16);
}

/* `exp_avg` begins at `first`, the others at 0. Comparisons are written so that a NaN in theta, m or h goes on into theta. */
ALWAYS_INLINE void update_block(void *restrict param, const void *restrict grad, float *restrict exp_avg,
                                const float *restrict hessian, int64_t first, int64_t last, Rule rule,
                                int64_t *restrict counts, int param_type, int grad_type, int noisy, int counting) {
    int32_t non_finite = 0, unclipped = 0, curved = 0;
    for (int64_t i = first; i < last; i++) {
        float g = load(grad, i, grad_type), theta = load(param, i, param_type), m = exp_avg[i - first], h = hessian[i];
        int usable = (bits_of(g) & 0x7f800000) != 0x7f800000;
        g = usable ? rule.sign * g : 0;
        float average = rule.beta1 * m + rule.one_minus_beta1 * g;
        m = usable ? average : m;
        float followed = rule.ahead * m + rule.ahead_grad * g;

        float denominator = rule.rho * h, floor = rule.eps;
        if (noisy) {
            float gradient_noise = rule.noise * sqrtf(h > 0 ? h : 0);
            floor = rule.eps > gradient_noise ? rule.eps : gradient_noise;
        }
        float ratio = followed / (floor > denominator ? floor : denominator) * rule.momentum_scale;
        float step = ratio > 1 ? 1 : ratio;
        step = step < -1 ? -1 : step;
        float moved = theta * rule.decay - rule.lr * step;

        exp_avg[i - first] = m;
        store(param, i, usable ? moved : theta, param_type);
        non_finite += !usable;
        if (counting) {
            unclipped += fabsf(ratio) < 1;
            curved += denominator > floor;
        }
    }
    counts[NON_FINITE] += non_finite;
    counts[UNCLIPPED] += unclipped;
    counts[CURVED] += curved;
}

/* Each combination of constants becomes a loop of its own. */
#define UPDATE(param_type, grad_type, noisy, counting) \
    update_block(param, grad, exp_avg, hessian, first, last, *rule, counts, param_type, grad_type, noisy, counting)
#define WITH_TYPES(param_type, grad_type)                                                     \
    (noisy ? (counting ? UPDATE(param_type, grad_type, 1, 1) : UPDATE(param_type, grad_type, 1, 0)) \
           : (counting ? UPDATE(param_type, grad_type, 0, 1) : UPDATE(param_type, grad_type, 0, 0)))

static void update_part(const Tensor *tensor, int64_t first, int64_t last, const Rule *rule, int counting,
                        int64_t *counts) {
    void *param = (void *)(uintptr_t)tensor->param;
    const void *grad = (const void *)(uintptr_t)tensor->grad;
    const float *hessian = (const float *)(uintptr_t)tensor->hessian;
    int noisy = rule->noise != 0, rounded = tensor->exp_avg_type == BFLOAT16;
    float widened[BLOCK];
    float *exp_avg = rounded ? widened : (float *)(uintptr_t)tensor->exp_avg + first;
    uint16_t *kept = (uint16_t *)(uintptr_t)tensor->exp_avg + first;

    if (rounded)
        for (int64_t i = 0; i < last - first; i++) widened[i] = load(kept, i, BFLOAT16);
    if (tensor->param_type == FLOAT32)
        tensor->grad_type == FLOAT32 ? WITH_TYPES(FLOAT32, FLOAT32) : WITH_TYPES(FLOAT32, BFLOAT16);
    else
        tensor->grad_type == FLOAT32 ? WITH_TYPES(BFLOAT16, FLOAT32) : WITH_TYPES(BFLOAT16, BFLOAT16);
    if (rounded)
        for (int64_t i = 0; i < last - first; i++) kept[i] = rounded_by_chance(widened[i], rule->seed);
}

static void update_range(Range *range) {
    const Tensor *tensor = range->tensors;
    int64_t before = 0; /* elements of the tensors before this one */
    for (int64_t at = range->first; at < range->last;) {
        for (; at >= before + tensor->size; tensor++) before += tensor->size;
        int64_t end = before + tensor->size < range->last ? before + tensor->size : range->last;
        if (end > at + BLOCK) end = at + BLOCK; /* so that 32 bits count */
        update_part(tensor, at - before, end - before, range->rule, range->counting, range->counts);
        at = end;
    }
}

typedef struct {
    Range ranges[MAX_THREADS];
    atomic_int next, threads;
} Work;

/* Takes ranges until none is left, so that a thread that cannot be had costs time only. */
static void take_ranges(void *work) {
    Work *w = work;
    for (int t; (t = atomic_fetch_add(&w->next, 1)) < w->threads;) update_range(&w->ranges[t]);
}

static void *take_ranges_of_thread(void *work) {
    take_ranges(work);
    return 0;
}

static void on_new_threads(void (*work)(void *), void *argument, unsigned threads, unsigned flags) {
    pthread_t handles[MAX_THREADS];
    unsigned started = 1;
    (void)flags;
    for (; started < threads; started++)
        if (pthread_create(&handles[started], 0, take_ranges_of_thread, argument)) break;
    work(argument);
    while (--started) pthread_join(handles[started], 0);
}

/* Updates `size` elements in all, in equal ranges on `threads` threads. `parallel` runs a function on each of a team of
 * threads, as GOMP_parallel does: those of a pool that waits by spinning would take their cores from new ones. 0 for new ones. */
void sophia_step(const Tensor *tensors, int64_t size, const Rule *rule, int counting, int threads, int64_t *counts,
                 void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    Work work;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    atomic_init(&work.next, 0);
    atomic_init(&work.threads, threads);
    for (int t = 0; t < threads; t++)
        work.ranges[t] = (Range){tensors, rule, size * t / threads, size * (t + 1) / threads, {0}, counting};
    if (threads == 1)
        take_ranges(&work);
    else
        (parallel ? parallel : on_new_threads)(take_ranges, &work, threads, 0);
    for (int t = 0; t < threads; t++)
        for (int c = 0; c < COUNTS; c++) counts[c] += work.ranges[t].counts[c];
}
