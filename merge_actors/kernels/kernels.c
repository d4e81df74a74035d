/* The hot formulas of raymerge, fused: one pass over the inputs, in tiles that stay in the first-level cache.
 *
 * The eager formulas (merge_actors/methods) are the reference: these give the same bits. So every operation
 * here is the one that torch's float32 kernels do, in the same order: `add` with `alpha` is a fused
 * multiply-add, everything else rounds once. It is compiled on the node that runs it (see build.py) with
 * contraction off and without any unsafe option. NaN and infinity are not merged here: an input that holds
 * them, or a sum of squares that is not finite, sends the caller back to the eager formulas.
 *
 * An element's place in the slice is `at`; its index in the tensor is `begin + at`. A unit is a fixed run of
 * elements of the tensor (methods/block.py) and every slice begins at one.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if !defined(__FMA__) && !defined(__aarch64__)
#error "torch adds with a fused multiply-add, which this processor lacks"
#endif

enum { TILE = 1024, LANES = 256, RUN = 1 << 16 };
enum { FLOAT32, BFLOAT16, FLOAT16 };                       /* element types */
enum { ZERO, RANDOM, LARGEST, NOT_LARGEST };               /* thinning steps */
enum { SUM, SUM_AGREEING, AVERAGE };                       /* formulas */
enum { MOST_STEPS = 4 };

typedef struct {
    const void *data;
    int64_t dtype;
} Input;

/* One sparsifying step of a model: which elements of its delta stay, and a factor on them. */
typedef struct {
    int64_t kind;
    uint64_t key;                 /* RANDOM: of the stream */
    int64_t limit;                /* RANDOM: words below it stay */
    int64_t pattern;              /* LARGEST: the cut's value, as a bit pattern */
    int64_t cut_begin, cut_end;   /* LARGEST: before, all equals of the value stay; behind, none ... */
    int64_t quota;                /* ... and between, the first so many */
    int64_t num_taken;            /* equals that were kept so far in this pass */
    double factor;
} Step;

typedef struct {
    Input input;
    double weight;
    int64_t num_steps;
    Step steps[MOST_STEPS];
} Model;

typedef struct {
    Input base;                   /* data is NULL without one */
    Model *models;
    int64_t num_models, num_elements, begin, unit;
    float *scratch;               /* (num_models + 4) * TILE */
} Slice;

typedef struct {
    int64_t formula;
    double scale;                 /* on the merged task vector */
    double divisor;               /* AVERAGE: sum of the weights */
    int64_t is_mean;              /* SUM_AGREEING: divide by the weights that count, ... */
    double least_divisor;         /* ... no less than this, or if it is 0 ... */
    double cancelled;             /* ... not by sizes up to this */
    void *out;
    int64_t out_dtype;
    double *unit_squares;         /* per unit, of the values before they are rounded */
    float *direction;             /* what `scale` multiplies: kept here, or NULL; no AVERAGE has one ... */
    int64_t is_known;             /* ... or already there */
} Formula;

/* A question about magnitudes in [low, high]; see methods/selection.py. */
typedef struct {
    int64_t low, high;            /* without the lumps */
    int64_t above;                /* count what is larger */
    int64_t lumps[2], num_lumps;
    int64_t shift;                /* a histogram of (pattern - low) >> shift, or -1 */
    int64_t *num_above;           /* of the slice */
    int64_t *lump_counts;         /* per unit and lump */
    int64_t *num_inside;          /* per unit */
    uint32_t *inside;
    int64_t *histogram;
} Question;

static uint32_t spread[RUN];      /* one well-mixed word for each value of an index's low 16 bits */

static inline float from_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline uint32_t to_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

static uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* To be called once, before anything else. */
void raymerge_prepare(void) {
    for (uint64_t i = 0; i < RUN; i++)
        spread[i] = (uint32_t)mixed(i * 0x9E3779B97F4A7C15u + 0x9E3779B97F4A7C15u);
}

/* Half precision: eight at a time where the processor can. */
static void widen_half(const uint16_t *restrict raw, float *restrict out, int n) {
    int i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(raw + i))));
    for (; i < n; i++) out[i] = _cvtsh_ss(raw[i]);
#else
    for (; i < n; i++) { __fp16 half; memcpy(&half, raw + i, 2); out[i] = (float)half; }
#endif
}

static void narrow_to_half(const float *restrict values, uint16_t *restrict out, int n) {
    int i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), 0));
    for (; i < n; i++) out[i] = _cvtss_sh(values[i], 0);
#else
    for (; i < n; i++) { __fp16 half = (__fp16)values[i]; memcpy(out + i, &half, 2); }
#endif
}

/* One pass over n elements of an input: BODY makes something of each, as float32 `x`; `is_finite` is cleared if
 * one is NaN or infinite. Half precision is widened into SPARE first, float32 scratch. */
#define FOR_EACH(INPUT, AT, N, SPARE, BODY)                                                   \
    do {                                                                                      \
        if ((INPUT)->dtype == BFLOAT16) {                                                     \
            const uint16_t *restrict raw = (const uint16_t *)(INPUT)->data + (AT);            \
            uint16_t largest = 0;                                                             \
            for (int i = 0; i < (N); i++) {                                                   \
                uint16_t size = raw[i] & 0x7FFF;                                              \
                largest = size > largest ? size : largest;                                    \
                float x = from_bits((uint32_t)raw[i] << 16);                                  \
                BODY;                                                                         \
            }                                                                                 \
            is_finite &= largest < 0x7F80;                                                    \
        } else {                                                                              \
            const float *restrict raw = (const float *)(INPUT)->data + (AT);                  \
            if ((INPUT)->dtype == FLOAT16) {                                                  \
                widen_half((const uint16_t *)(INPUT)->data + (AT), (SPARE), (N));             \
                raw = (SPARE);                                                                \
            }                                                                                 \
            uint32_t largest = 0;                                                             \
            for (int i = 0; i < (N); i++) {                                                   \
                uint32_t size = to_bits(raw[i]) & 0x7FFFFFFF;                                 \
                largest = size > largest ? size : largest;                                    \
                float x = raw[i];                                                             \
                BODY;                                                                         \
            }                                                                                 \
            is_finite &= largest < 0x7F800000;                                                \
        }                                                                                     \
    } while (0)

/* Load n elements as float32; returns whether all are finite. */
static int load(const Input *input, int64_t at, int n, float *restrict out) {
    int is_finite = 1;
    float spare[TILE];
    FOR_EACH(input, at, n, spare, out[i] = x);
    return is_finite;
}

/* out <- x - base */
static int load_difference(
    const Input *input, const float *restrict base, int64_t at, int n, float *restrict out
) {
    int is_finite = 1;
    float spare[TILE];
    FOR_EACH(input, at, n, spare, out[i] = x - base[i]);
    return is_finite;
}

/* total <- total + factor * (x - base) */
static int add_difference(
    const Input *input, const float *restrict base, float factor, int64_t at, int n, float *restrict total
) {
    int is_finite = 1;
    float spare[TILE];
    FOR_EACH(input, at, n, spare, total[i] = fmaf(x - base[i], factor, total[i]));
    return is_finite;
}

/* total <- total + factor * x */
static int add_values(const Input *input, float factor, int64_t at, int n, float *restrict total) {
    int is_finite = 1;
    float spare[TILE];
    FOR_EACH(input, at, n, spare, total[i] = fmaf(x, factor, total[i]));
    return is_finite;
}

static void store(float *restrict values, void *out, int64_t dtype, int64_t at, int n) {
    if (dtype == FLOAT32) {
        memcpy((float *)out + at, values, 4 * (size_t)n);
    } else if (dtype == FLOAT16) {
        narrow_to_half(values, (uint16_t *)out + at, n);
    } else {  /* to the nearest, ties to even */
        uint16_t *restrict to = (uint16_t *)out + at;
        for (int i = 0; i < n; i++) {
            uint32_t bits = to_bits(values[i]);
            to[i] = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
        }
    }
}

/* Zero the elements whose random word is at least the limit; `index` is the first one's in the tensor. */
static void drop_at_random(float *restrict delta, int64_t index, int n, const Step *step) {
    int32_t limit = (int32_t)step->limit;
    for (int done = 0; done < n;) {
        int64_t run = (index + done) / RUN;
        int low = (int)((index + done) % RUN);
        int stop = RUN - low < n - done ? done + RUN - low : n;
        uint64_t key = mixed(step->key + (uint64_t)run * 0x9E3779B97F4A7C15u);
        uint32_t first = (uint32_t)key, second = (uint32_t)(key >> 32);
        const uint32_t *restrict table = spread + low - done;
        for (int i = done; i < stop; i++) {
            uint32_t word = table[i] + first;
            word = (word ^ (word >> 16)) * 0x21F0AAADu + second;
            word = (word ^ (word >> 15)) * 0x735A2D97u;
            int32_t stays = ((int32_t)word >> 1) < limit ? -1 : 0;
            delta[i] = from_bits(to_bits(delta[i]) & (uint32_t)stays);
        }
        done = stop;
    }
}

/* Zero the elements that are not among the largest; or subtract those that are, as the eager formula does. */
static void keep_largest(float *restrict delta, int64_t at, int n, Step *step) {
    uint32_t pattern = (uint32_t)step->pattern, least = pattern;
    int is_subtracted = step->kind == NOT_LARGEST;
    if (at >= step->cut_end) {
        least = pattern + 1;
    } else if (at >= step->cut_begin) {  /* tiles do not cross units */
        int32_t equals = 0;
        for (int i = 0; i < n; i++) equals += (to_bits(delta[i]) & 0x7FFFFFFF) == pattern;
        int64_t left = step->quota - step->num_taken;
        if (left == 0) {
            least = pattern + 1;
        } else if (equals > left) {  /* the first ones stay, one by one */
            for (int i = 0; i < n; i++) {
                uint32_t size = to_bits(delta[i]) & 0x7FFFFFFF;
                float largest = size > pattern || (size == pattern && left-- > 0) ? delta[i] : 0;
                delta[i] = is_subtracted ? delta[i] - largest : largest;
            }
            step->num_taken = step->quota;
            return;
        } else {
            step->num_taken += equals;
        }
    }
    for (int i = 0; i < n; i++) {
        uint32_t bits = to_bits(delta[i]);
        float largest = from_bits((bits & 0x7FFFFFFF) >= least ? bits : 0);
        delta[i] = is_subtracted ? delta[i] - largest : largest;
    }
}

/* Put the delta of a model after its first steps into `out`; returns whether the inputs are finite. */
static int load_delta(
    const Slice *slice, Model *model, int64_t num_steps, const float *restrict base, int64_t at, int n,
    float *restrict out
) {
    int is_finite = load_difference(&model->input, base, at, n, out);
    for (int64_t s = 0; s < num_steps; s++) {
        Step *step = &model->steps[s];
        if (step->kind == RANDOM) drop_at_random(out, slice->begin + at, n, step);
        else if (step->kind == ZERO) memset(out, 0, 4 * (size_t)n);
        else keep_largest(out, at, n, step);
        float factor = (float)step->factor;
        if (factor != 1)
            for (int i = 0; i < n; i++) out[i] *= factor;
    }
    return is_finite;
}

static void multiply(float *restrict values, double factor, int n) {
    float by = (float)factor;
    if (factor != 1)
        for (int i = 0; i < n; i++) values[i] *= by;
}

static void add_scaled(float *restrict total, const float *restrict values, double factor, int n) {
    float by = (float)factor;
    for (int i = 0; i < n; i++) total[i] = fmaf(values[i], by, total[i]);
}

/* total <- base + scale * total */
static void add_to_base(float *restrict total, const float *restrict base, double scale, int n) {
    float by = (float)scale;
    for (int i = 0; i < n; i++) total[i] = fmaf(total[i], by, base[i]);
}

/* methods/consensus.py, sum_task_vectors: sum_i w_i delta_i. */
static int sum_vectors(
    const Slice *slice, const float *base, int64_t at, int n, float *total, float *vector
) {
    int is_finite = 1;
    for (int64_t m = 0; m < slice->num_models; m++) {
        Model *model = &slice->models[m];
        if (m && !model->num_steps) {
            is_finite &= add_difference(&model->input, base, (float)model->weight, at, n, total);
            continue;
        }
        is_finite &= load_delta(slice, model, model->num_steps, base, at, n, m ? vector : total);
        if (m) add_scaled(total, vector, model->weight, n);
        else multiply(total, model->weight, n);
    }
    return is_finite;
}

/* methods/averages.py, linear: sum_i w_i x_i / divisor. */
static int average(const Slice *slice, const Formula *formula, int64_t at, int n, float *restrict total) {
    const Model *models = slice->models;
    int is_finite = load(&models[0].input, at, n, total);
    multiply(total, models[0].weight, n);
    for (int64_t m = 1; m < slice->num_models; m++)
        is_finite &= add_values(&models[m].input, (float)models[m].weight, at, n, total);
    float divisor = (float)formula->divisor;
    if (formula->divisor != 1)
        for (int i = 0; i < n; i++) total[i] /= divisor;
    return is_finite;
}

/* methods/consensus.py, sum_agreeing: merge{v_i : sign v_i is the sign of sum_i v_i}. */
static int sum_agreeing(
    const Slice *slice, const Formula *formula, const float *base, int64_t at, int n, float *restrict total,
    float *restrict divisor, float *restrict elected, float *vectors
) {
    int is_finite = 1;
    for (int64_t m = 0; m < slice->num_models; m++) {
        Model *model = &slice->models[m];
        float *restrict vector = vectors + m * TILE;
        is_finite &= load_delta(slice, model, model->num_steps, base, at, n, vector);
        float weight = (float)model->weight;
        if (m)
            for (int i = 0; i < n; i++) elected[i] += vector[i] *= weight;
        else
            for (int i = 0; i < n; i++) elected[i] = (vector[i] *= weight) + 0.0f;  /* -0 elects + */
    }
    for (int64_t m = 0; m < slice->num_models; m++) {
        const float *restrict vector = vectors + m * TILE;
        float weight = (float)slice->models[m].weight;
        for (int i = 0; i < n; i++) {
            float agreeing = from_bits(to_bits(vector[i]) ^ (to_bits(elected[i]) & 0x80000000u));
            agreeing = agreeing < 0 ? 0 : agreeing;
            float counted = agreeing > 0 ? weight : 0;
            total[i] = m ? total[i] + agreeing : agreeing;
            divisor[i] = m ? divisor[i] + counted : counted;
        }
    }
    if (formula->is_mean) {
        float least = (float)formula->least_divisor, cancelled = (float)formula->cancelled;
        if (least > 0)
            for (int i = 0; i < n; i++) divisor[i] = divisor[i] < least ? least : divisor[i];
        else
            for (int i = 0; i < n; i++) divisor[i] = fabsf(divisor[i]) <= cancelled ? 1 : divisor[i];
        for (int i = 0; i < n; i++) total[i] /= divisor[i];
    }
    for (int i = 0; i < n; i++)
        total[i] = from_bits(to_bits(total[i]) ^ (to_bits(elected[i]) & 0x80000000u));
    return is_finite;
}

/* Square in float64 (exact) and add to the lanes, element i of a unit to lane i % LANES. */
static void add_squares(const float *restrict values, int n, double *restrict lanes) {
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] = fma(values[i + j], values[i + j], lanes[j]);
    for (int j = 0; i + j < n; j++) lanes[j] = fma(values[i + j], values[i + j], lanes[j]);
}

static double sum_of_lanes(double *lanes) {
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
    return lanes[0];
}

/* Start a pass over the slice: no quota is used up. */
static void start(const Slice *slice) {
    for (int64_t m = 0; m < slice->num_models; m++)
        for (int64_t s = 0; s < slice->models[m].num_steps; s++) slice->models[m].steps[s].num_taken = 0;
}

/* Merge a slice. Returns 1, or 0 if an input holds NaN or infinity; the output is then of no use. */
int raymerge_merge(const Slice *slice, const Formula *formula) {
    float *base = slice->scratch, *total = base + TILE, *divisor = total + TILE, *elected = divisor + TILE;
    float *vectors = elected + TILE;
    double lanes[LANES];
    start(slice);
    for (int64_t first = 0, unit = 0; first < slice->num_elements; first += slice->unit, unit++) {
        int64_t left = slice->num_elements - first, stop = first + (left < slice->unit ? left : slice->unit);
        memset(lanes, 0, sizeof lanes);
        for (int64_t at = first; at < stop; at += TILE) {
            int n = stop - at < TILE ? (int)(stop - at) : TILE, is_finite = 1;
            if (slice->base.data) is_finite = load(&slice->base, at, n, base);
            if (formula->is_known) memcpy(total, formula->direction + at, 4 * (size_t)n);
            else if (formula->formula == SUM) is_finite &= sum_vectors(slice, base, at, n, total, vectors);
            else if (formula->formula == AVERAGE) is_finite &= average(slice, formula, at, n, total);
            else is_finite &= sum_agreeing(slice, formula, base, at, n, total, divisor, elected, vectors);
            if (!is_finite) return 0;
            if (formula->direction && !formula->is_known) memcpy(formula->direction + at, total, 4 * (size_t)n);
            if (formula->formula != AVERAGE) add_to_base(total, base, formula->scale, n);
            store(total, formula->out, formula->out_dtype, at, n);
            add_squares(total, n, lanes);
        }
        formula->unit_squares[unit] = sum_of_lanes(lanes);
    }
    return 1;
}

/* Write the magnitudes of every `stride`-th element of each unit of the only model's delta, as bit patterns.
 * Returns how many, or -1 if an input is not finite. */
int64_t raymerge_sample(const Slice *slice, int64_t stride, uint32_t *out) {
    float *base = slice->scratch, *delta = base + TILE;
    Model *model = &slice->models[0];
    int64_t num_sampled = 0, next = 0;
    start(slice);
    for (int64_t first = 0; first < slice->num_elements; first += slice->unit) {
        int64_t left = slice->num_elements - first, stop = first + (left < slice->unit ? left : slice->unit);
        next = first;
        if (model->num_steps == 0 && stride > 1) {  /* nothing between is looked at */
            for (; next < stop; next += stride) {
                if (!load(&slice->base, next, 1, base) || !load(&model->input, next, 1, delta)) return -1;
                out[num_sampled++] = to_bits(delta[0] - base[0]) & 0x7FFFFFFF;
            }
            continue;
        }
        for (int64_t at = first; at < stop; at += TILE) {
            int n = stop - at < TILE ? (int)(stop - at) : TILE;
            if (!load(&slice->base, at, n, base)) return -1;
            if (!load_delta(slice, model, model->num_steps, base, at, n, delta)) return -1;
            for (; next < at + n; next += stride) out[num_sampled++] = to_bits(delta[next - at]) & 0x7FFFFFFF;
        }
    }
    return num_sampled;
}

/* Append the patterns in [low, low + span] to `inside`, which has room for sixteen more than there are. */
static int64_t collect(const uint32_t *restrict patterns, int n, uint32_t low, uint32_t span, uint32_t *restrict inside) {
    int64_t found = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16) {
#ifdef __AVX512F__
        __m512i group = _mm512_loadu_si512(patterns + i);
        __m512i above_low = _mm512_sub_epi32(group, _mm512_set1_epi32((int)low));
        __mmask16 is_inside = _mm512_cmple_epu32_mask(above_low, _mm512_set1_epi32((int)span));
        _mm512_storeu_si512(inside + found, _mm512_maskz_compress_epi32(is_inside, group));
        found += __builtin_popcount(is_inside);
#else
        uint32_t any = 0;
        for (int j = 0; j < 16; j++) any |= patterns[i + j] - low <= span;
        for (int j = 0; any && j < 16; j++) {  /* few groups hold one */
            inside[found] = patterns[i + j];
            found += patterns[i + j] - low <= span;
        }
#endif
    }
    for (; i < n; i++)
        if (patterns[i] - low <= span) inside[found++] = patterns[i];
    return found;
}

/* Answer a question about the only model's delta. Returns 1, or 0 if an input is not finite. */
int raymerge_answer(const Slice *slice, const Question *question) {
    float *base = slice->scratch, *delta = base + TILE;
    uint32_t *patterns = (uint32_t *)(delta + TILE), *inside = question->inside;
    uint32_t low = (uint32_t)question->low, span = (uint32_t)(question->high - question->low);
    uint32_t above = (uint32_t)question->above;
    Model *model = &slice->models[0];
    start(slice);
    for (int64_t first = 0, unit = 0; first < slice->num_elements; first += slice->unit, unit++) {
        int64_t left = slice->num_elements - first, stop = first + (left < slice->unit ? left : slice->unit);
        uint32_t *of_unit = inside;
        for (int64_t at = first; at < stop; at += TILE) {
            int n = stop - at < TILE ? (int)(stop - at) : TILE;
            int32_t num_above = 0;
            if (!load(&slice->base, at, n, base)) return 0;
            if (!load_delta(slice, model, model->num_steps, base, at, n, delta)) return 0;
            for (int i = 0; i < n; i++) {
                patterns[i] = to_bits(delta[i]) & 0x7FFFFFFF;
                num_above += patterns[i] > above;
            }
            *question->num_above += num_above;
            for (int64_t k = 0; k < question->num_lumps; k++) {
                uint32_t lump = (uint32_t)question->lumps[k];
                int32_t count = 0;
                for (int i = 0; i < n; i++) count += patterns[i] == lump;
                question->lump_counts[unit * question->num_lumps + k] += count;
            }
            if (question->low > question->high) continue;
            if (question->shift < 0) {
                inside += collect(patterns, n, low, span, inside);
            } else {
                for (int i = 0; i < n; i++)
                    if (patterns[i] - low <= span) question->histogram[(patterns[i] - low) >> question->shift]++;
            }
        }
        question->num_inside[unit] = inside - of_unit;
    }
    return 1;
}
