// Draw the next token of each row of logits: token mask, temperature, top-k, top-p, min-p and the draw, in one launch.
//
//     logits        [B, V]   float32, rows logits_stride apart; not modified
//     mask          [B, ...] int32, rows mask_stride apart, or null: bit i % 32 of word i / 32 says whether token i may
//                            come next
//     temperatures  [B]      float64; 0: the most likely token, the lowest id of equals
//     top_k         [B]      int32; 0: off      top_p, min_p  [B] float64; 1 and 0: off
//     seeds, steps  [B]      int64: name the row's uniform number
//     tokens        [B]      int64: the token; -1 if none may be drawn or a logit is NaN or +infinity
//     log_probs     [B]      float32 or null: log-probability of the token by the logits as given, without mask,
//                            temperature and filters
//
// The filters are those of `sampler.py`: top-k keeps all tokens as likely as the k-th; top-p keeps a token while those
// before it, most likely first and of equals the lowest id first, have less than top_p of the mass; min-p drops what is
// less likely than min_p times the most likely one. The draw: the first id at which the running sum of the kept weights
// passes the uniform number times their sum.
//
// A weight is exp((logit - largest) / temperature) in float32, as a whole number of 2^-40. Sums of whole numbers are
// exact in any order, so a row's token depends on its own logits and parameters alone. Against float64 a weight is off
// by about 1e-7 of itself, and weights below 2^-40 are 0: where the mass comes that close to a threshold, the last
// token kept or the token drawn can differ from those of `sampler.py`. Comparing logits (top-k, greedy) is exact.
//
// One block of 1024 threads a row. Nothing is sorted but a short list. The k-th largest of the threads' own maxima is a
// bound below which none of the k most likely tokens lies, so that one pass finds a list of little more than k that
// holds them all:
//
//     thread       0        1        2      ...  1023       each has V / 1024 tokens, 1024 apart
//     maximum     2.1      0.3      7.9     ...   1.2       sorted: 7.9, 2.1, 1.2 ... the k-th is the bound
//
// For top-p alone the list is that of the kListed-th maximum. If its mass does not reach top_p (a flat distribution),
// or the list overflows, the threshold is searched over the whole row, four ways a pass. Ids are found by sums over
// ever smaller ranges.
//
// The caller guarantees: blockDim.x = 1024, gridDim.x = B.
#include "common.cuh"

namespace exl2 {

using Mass = unsigned long long;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kListRoom = 2048;
constexpr int kListed = 512;
constexpr float kOne = 1099511627776.0f;  // 2^40: the weight of the most likely token
constexpr unsigned kNothing = 0x007FFFFFu;  // order_key(-infinity)

// Larger logits have larger keys; NaN with either sign lies beyond the infinities.
__device__ __forceinline__ unsigned order_key(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
    return bits ^ ((bits & 0x80000000u) != 0 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ __forceinline__ float logit_of(unsigned key) {
    return __uint_as_float(key ^ ((key & 0x80000000u) != 0 ? 0x80000000u : 0xFFFFFFFFu));
}

// The uniform number of a seed and step, as 64 bits of which the upper 53 count: Philox 4x64 of ten rounds, as numpy's.
__device__ __forceinline__ Mass uniform_bits(Mass seed, Mass step) {
    Mass counter[4] = {step + 1, step + 1 == 0 ? 1ull : 0ull, 0, 0}, key[2] = {seed, 0};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const Mass a = 0xD2E7470EE14C6C93ull, b = 0xCA5A826395121157ull;
        const Mass high_a = __umul64hi(a, counter[0]), low_a = a * counter[0];
        const Mass high_b = __umul64hi(b, counter[2]), low_b = b * counter[2];
        counter[0] = high_b ^ counter[1] ^ key[0];
        counter[2] = high_a ^ counter[3] ^ key[1];
        counter[1] = low_b;
        counter[3] = low_a;
        key[0] += 0x9E3779B97F4A7C15ull;
        key[1] += 0xBB67AE8584CAA73Bull;
    }
    return counter[0];
}

struct Row {
    const float* logits;
    const unsigned* mask;
    int vocabulary;
    float largest, temperature;

    __device__ __forceinline__ unsigned key(int id) const {
        if (mask != nullptr && ((mask[id / 32] >> (id % 32)) & 1u) == 0) return kNothing;
        return order_key(logits[id]);
    }
    __device__ __forceinline__ float weight(unsigned key) const {
        return key <= kNothing ? 0.0f : expf(__fdiv_rn(logit_of(key) - largest, temperature));
    }
    __device__ __forceinline__ Mass mass(unsigned key) const { return static_cast<Mass>(weight(key) * kOne); }
};

struct Room {
    Mass list[kListRoom];
    Mass parts[kWarps];
    Mass found;
    int length;
};

__device__ __forceinline__ Mass warp_total(Mass x) {
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}
__device__ __forceinline__ Mass warp_running(Mass x) {  // inclusive
    const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
        const Mass other = __shfl_up_sync(kAllLanes, x, distance);
        if (lane >= distance) x += other;
    }
    return x;
}

// The sum over the block, in every thread.
__device__ __forceinline__ Mass block_total(Mass x, Room& room) {
    const int lane = threadIdx.x % kWarpThreads;
    x = warp_total(x);
    __syncthreads();
    if (lane == 0) room.parts[threadIdx.x / kWarpThreads] = x;
    __syncthreads();
    return warp_total(room.parts[lane]);
}

// The sum over this thread and those before it.
__device__ __forceinline__ Mass block_running(Mass x, Room& room) {
    const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    x = warp_running(x);
    __syncthreads();
    if (lane == kWarpThreads - 1) room.parts[warp] = x;
    __syncthreads();
    return x + warp_total(lane < warp ? room.parts[lane] : 0);
}

// The sum of value(id) over all ids; and the first id at which the running sum passes pick(sum).
template <class Value, class Pick>
__device__ __forceinline__ int find_id(int n_ids, const Value& value, const Pick& pick, Room& room) {
    const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    int begin = 0, end = n_ids;
    Mass target = 0;
    while (true) {
        const int width = ((end - begin + kWarps - 1) / kWarps + kWarpThreads - 1) / kWarpThreads * kWarpThreads;
        const int first = begin + warp * width, last = min(end, first + width);
        Mass sum = 0;
        for (int id = first + lane; id < last; id += kWarpThreads) sum += value(id);
        sum = warp_total(sum);
        __syncthreads();
        if (lane == 0) room.parts[warp] = sum;
        __syncthreads();
        const Mass part = room.parts[lane], running = warp_running(part);
        if (end - begin == n_ids) target = pick(__shfl_sync(kAllLanes, running, kWarpThreads - 1));
        const unsigned passed = __ballot_sync(kAllLanes, running > target);
        if (passed == 0) return -1;
        const int chosen = __ffs(passed) - 1;
        target -= __shfl_sync(kAllLanes, running - part, chosen);
        begin += chosen * width;
        end = min(end, begin + width);
        if (width == kWarpThreads) break;
    }
    const Mass running = warp_running(begin + lane < end ? value(begin + lane) : 0);
    return begin + __ffs(__ballot_sync(kAllLanes, running > target)) - 1;
}

// The largest key for which the sum of value(key of id) over keys at least as large reaches `target`, which must be at
// most the sum over all. `above`: that sum over larger keys.
template <class Value>
__device__ __forceinline__ unsigned find_key(const Row& row, const Value& value, Mass target, Mass& above, Room& room) {
    unsigned low = 0, high = 0xFFFFFFFFu;  // low <= the key <= high
    above = 0;                             // over keys > high
    while (low < high) {
        const unsigned step = (high - low) / 4 + 1;
        unsigned pivots[3];
        Mass sums[3] = {0, 0, 0};  // over keys in [pivot, high]
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            pivots[i] = high - low >= step * static_cast<Mass>(i + 1) ? low + step * (i + 1) : high;
        }
        for (int id = threadIdx.x; id < row.vocabulary; id += kThreads) {
            const unsigned key = row.key(id);
            if (key < pivots[0] || key > high) continue;
            const Mass one = value(key);
#pragma unroll
            for (int i = 0; i < 3; ++i) sums[i] += key >= pivots[i] ? one : 0;
        }
#pragma unroll
        for (int i = 0; i < 3; ++i) sums[i] = block_total(sums[i], room);
        if (above + sums[2] >= target) {
            low = pivots[2];
        } else if (above + sums[1] >= target) {
            low = pivots[1], high = pivots[2] - 1, above += sums[2];
        } else if (above + sums[0] >= target) {
            low = pivots[0], high = pivots[1] - 1, above += sums[1];
        } else {
            high = pivots[0] - 1, above += sums[0];
        }
    }
    return low;
}

// Sort the first n numbers of the list, n at most kListRoom; what is beyond them is overwritten.
__device__ __forceinline__ void sort_list(int n, Room& room) {
    int size = 2;
    while (size < n) size *= 2;
    __syncthreads();
    for (int i = n + threadIdx.x; i < size; i += kThreads) room.list[i] = ~0ull;
    for (int block = 2; block <= size; block *= 2) {
        for (int distance = block / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
                const int i = pair / distance * 2 * distance + pair % distance, j = i + distance;
                const bool rising = (i & block) == 0;
                const Mass a = room.list[i], b = room.list[j];
                if ((a > b) == rising) room.list[i] = b, room.list[j] = a;
            }
        }
    }
    __syncthreads();
}

// A list entry that sorts by key, the largest first, and of equals by id.
__device__ __forceinline__ Mass by_key(unsigned key, int id) {
    return static_cast<Mass>(~key) << 32 | static_cast<unsigned>(id);
}
__device__ __forceinline__ unsigned key_of(Mass entry) { return ~static_cast<unsigned>(entry >> 32); }

__device__ __forceinline__ Mass pick_target(Mass bits, Mass total) { return __umul64hi(bits >> 11 << 11, total); }

__device__ __forceinline__ Mass wanted_mass(double top_p, Mass total) {
    const Mass wanted = static_cast<Mass>(ceil(top_p * static_cast<double>(total)));
    return wanted < 1 ? 1 : wanted > total ? total : wanted;
}

// Draw from the list, which holds the `n` most likely tokens sorted, of a distribution that has all in it that matter.
// `total`: the mass that top_p is a share of, 0 if it is that of the tokens kept by top_k.
__device__ __forceinline__ int draw_from_list(const Row& row, int n, int top_k, double top_p, double min_p, Mass total,
                                              Mass bits, Room& room) {
    // Thread i has entries 2i and 2i + 1.
    const int i = 2 * threadIdx.x;
    if (top_k > 0 && top_k < n) {
        const unsigned least = key_of(room.list[top_k - 1]);
        const int kept = static_cast<int>(i < n && key_of(room.list[i]) >= least) +
                         static_cast<int>(i + 1 < n && key_of(room.list[i + 1]) >= least);
        n = static_cast<int>(block_total(kept, room));
    }
    const unsigned keys[2] = {i < n ? key_of(room.list[i]) : 0, i + 1 < n ? key_of(room.list[i + 1]) : 0};
    const float weights[2] = {row.weight(keys[0]), row.weight(keys[1])};
    const Mass masses[2] = {row.mass(keys[0]), row.mass(keys[1])};
    const Mass running = block_running(masses[0] + masses[1], room);
    const Mass before[2] = {running - masses[1] - masses[0], running - masses[1]};
    if (total == 0) total = block_total(masses[0] + masses[1], room);
    const Mass wanted = top_p < 1.0 ? wanted_mass(top_p, total) : ~0ull;
    int kept = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        kept += i + e < n && before[e] < wanted && static_cast<double>(weights[e]) >= min_p && masses[e] > 0;
    }
    n = static_cast<int>(block_total(kept, room));  // they are the first n: all conditions fall with the order
    __syncthreads();
    // Now by id.
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (i + e < n) room.list[i + e] = room.list[i + e] << 32 | keys[e];
    }
    sort_list(n, room);
    const Mass parts[2] = {i < n ? row.mass(static_cast<unsigned>(room.list[i])) : 0,
                           i + 1 < n ? row.mass(static_cast<unsigned>(room.list[i + 1])) : 0};
    const Mass end = block_running(parts[0] + parts[1], room), sum = block_total(parts[0] + parts[1], room);
    const Mass target = pick_target(bits, sum);
    if (end - parts[1] - parts[0] <= target && target < end) {
        room.found = room.list[target < end - parts[1] ? i : i + 1] >> 32;
    }
    __syncthreads();
    return static_cast<int>(room.found);
}

__device__ __forceinline__ int draw(Row& row, unsigned own_maximum, double temperature, int top_k, double top_p,
                                    double min_p, Mass bits, Room& room) {
    row.temperature = fmaxf(static_cast<float>(temperature), 1.2e-38f);  // 0 / 0 would be no weight
    const bool limits_k = top_k > 0 && top_k < row.vocabulary, limits_p = top_p < 1.0;
    const int wanted_maxima = limits_k ? top_k : kListed;
    if ((limits_k || limits_p) && wanted_maxima <= kThreads) {
        room.list[threadIdx.x] = by_key(own_maximum, threadIdx.x);
        sort_list(kThreads, room);
        const unsigned bound = max(key_of(room.list[wanted_maxima - 1]), kNothing + 1);
        __syncthreads();
        if (threadIdx.x == 0) room.length = 0;
        __syncthreads();
        Mass sum = 0;
        for (int id = threadIdx.x; id < row.vocabulary; id += kThreads) {
            const unsigned key = row.key(id);
            if (!limits_k) sum += row.mass(key);
            if (key >= bound) {
                const int at = atomicAdd(&room.length, 1);
                if (at < kListRoom) room.list[at] = by_key(key, id);
            }
        }
        const Mass total = block_total(sum, room);  // 0 with top_k
        const int n = room.length;
        if (n <= kListRoom) {
            sort_list(n, room);
            if (limits_k) return draw_from_list(row, n, top_k, top_p, min_p, 0, bits, room);
            Mass listed = 0;
            for (int i = threadIdx.x; i < n; i += kThreads) listed += row.mass(key_of(room.list[i]));
            if (block_total(listed, room) >= wanted_mass(top_p, total)) {
                return draw_from_list(row, n, 0, top_p, min_p, total, bits, room);
            }
        }
        __syncthreads();
    }
    // Over the whole row.
    unsigned least = kNothing + 1;  // the smallest key that is kept
    int last_equal = row.vocabulary;  // the largest id that is kept of those with that key
    Mass above;
    if (limits_k) least = max(least, find_key(row, [](unsigned) -> Mass { return 1; }, top_k, above, room));
    if (limits_p) {
        const unsigned kept = least;
        const auto mass = [&row, kept](unsigned key) -> Mass { return key >= kept ? row.mass(key) : 0; };
        Mass sum = 0;
        for (int id = threadIdx.x; id < row.vocabulary; id += kThreads) sum += mass(row.key(id));
        const Mass wanted = wanted_mass(top_p, block_total(sum, room));
        least = find_key(row, mass, wanted, above, room);
        const Mass each = row.mass(least), n_equal = (wanted - above + each - 1) / each;  // kept
        const auto is_equal = [&row, least](int id) -> Mass { return row.key(id) == least; };
        last_equal = find_id(row.vocabulary, is_equal, [n_equal](Mass) { return n_equal - 1; }, room);
    }
    const auto kept_mass = [&row, least, last_equal, min_p](int id) -> Mass {
        const unsigned key = row.key(id);
        if (key < least || (key == least && id > last_equal)) return 0;
        const float weight = row.weight(key);
        return static_cast<double>(weight) >= min_p ? static_cast<Mass>(weight * kOne) : 0;
    };
    return find_id(row.vocabulary, kept_mass, [bits](Mass total) { return pick_target(bits, total); }, room);
}

// log(exp(logit of the token) / sum of exp(logits)), summed in a fixed order.
__device__ __forceinline__ float log_probability(const Row& row, int token, Room& room) {
    float* scratch = reinterpret_cast<float*>(room.parts);
    const int lane = threadIdx.x % kWarpThreads;
    float largest = -__int_as_float(0x7f800000), sum = 0.0f;
    for (int id = threadIdx.x; id < row.vocabulary; id += kThreads) largest = fmaxf(largest, row.logits[id]);
    largest = warp_max(largest);
    __syncthreads();
    if (lane == 0) scratch[threadIdx.x / kWarpThreads] = largest;
    __syncthreads();
    largest = warp_max(scratch[lane]);
    __syncthreads();
    for (int id = threadIdx.x; id < row.vocabulary; id += kThreads) sum += expf(row.logits[id] - largest);
    return row.logits[token] - largest - logf(block_sum(sum, scratch));
}

}  // namespace exl2

extern "C" __global__ void __launch_bounds__(1024)
    sample(const float* logits, const unsigned* mask, const double* temperatures, const int* top_k, const double* top_p,
           const double* min_p, const long long* seeds, const long long* steps, long long* tokens, float* log_probs,
           int vocabulary, long long logits_stride, long long mask_stride) {
    using namespace exl2;
    EXL2_SHARED(Room, rooms, 1);
    Room& room = rooms[0];
    const long long index = blockIdx.x;
    const unsigned* own_mask = mask == nullptr ? nullptr : mask + index * mask_stride;
    Row row{logits + index * logits_stride, own_mask, vocabulary, 0.0f, 1.0f};

    unsigned own_maximum = kNothing;
    int own_id = vocabulary;
    for (int id = threadIdx.x; id < vocabulary; id += kThreads) {
        const unsigned key = row.key(id);
        // NaN with a sign has a key below -infinity's: it must not hide there.
        const bool is_nan = key < kNothing;
        if (is_nan || key > own_maximum) own_maximum = is_nan ? 0xFFFFFFFFu : key, own_id = id;
    }
    // The largest key and of equals the lowest id, as one number.
    const int lane = threadIdx.x % kWarpThreads;
    Mass best = static_cast<Mass>(own_maximum) << 32 | static_cast<unsigned>(~own_id);
#pragma unroll
    for (int round = 0; round < 2; ++round) {
#pragma unroll
        for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
            const Mass other = __shfl_xor_sync(kAllLanes, best, distance);
            best = other > best ? other : best;
        }
        if (round == 0) {
            if (lane == 0) room.parts[threadIdx.x / kWarpThreads] = best;
            __syncthreads();
            best = room.parts[lane];
        }
    }
    __syncthreads();
    const unsigned largest = static_cast<unsigned>(best >> 32);
    int token = static_cast<int>(~static_cast<unsigned>(best));
    const bool is_sound = largest > kNothing && largest < order_key(__int_as_float(0x7f800000));
    if (is_sound && temperatures[index] > 0.0) {
        row.largest = logit_of(largest);
        const Mass bits = uniform_bits(static_cast<Mass>(seeds[index]), static_cast<Mass>(steps[index]));
        token = draw(row, own_maximum, temperatures[index], top_k[index], top_p[index], min_p[index], bits, room);
    }
    float log_prob = __int_as_float(0x7fc00000);
    if (is_sound && log_probs != nullptr) {
        __syncthreads();
        log_prob = log_probability(row, token, room);
    }
    if (threadIdx.x == 0) {
        tokens[index] = is_sound ? token : -1;
        if (log_probs != nullptr) log_probs[index] = log_prob;
    }
}
