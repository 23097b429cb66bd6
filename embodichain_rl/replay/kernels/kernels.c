/* The compiled hot path of sampling: draw, look up rows, copy chunks, build the index, check the ids again.
 *
 * It has no Python API: Python calls it through ctypes, which releases the GIL. `twin.py` does the same with NumPy, and
 * the tests compare both to the bit. `plans.py` describes the structures below.
 *
 * MEMORY MODEL
 *
 * Other processes write to the shared memory while it is read here. No lock is taken. A batch is whole because of the
 * order of loads; `replay/ledger/ledger.py` has the protocol of the writers. They
 *   (W1) store -1 as the id of a row before they change the row, or the steps that it refers to;
 *   (W2) store the row and its steps before they store its id;
 *   (W3) store the row, id included, before they store `active`, whose lowest bit selects the valid counters;
 *   (W4) store `active` before they change the copy of the counters that it has made invalid.
 * x86-64 makes these stores visible in this order. On other processors the writers call membarrier(2) between them.
 *
 * The reader
 *   (R1) loads `active`, the counters, and `active` again. If both are equal, the counters were valid together (W4),
 *        and all rows of the live ids are visible (W3);
 *   (R2) loads the words of a row, and then its id. If that is the id that was drawn, the words are of this trajectory:
 *        an id is stored once only, and never again after it was removed (W1, W2). So `start` and `length` are valid,
 *        and no copy leaves the arena, whatever happens to the steps meanwhile;
 *   (R3) copies the steps, and then loads all ids again. If an id is still there, no byte that was copied had been
 *        changed before (W1). Otherwise the chunk is discarded and drawn again.
 *
 * `load` is an acquire load: later loads, and copies, are not made before it. Copies are ordinary loads, which may not
 * move beyond the acquire fence that follows them. So R1, R2 and R3 hold for the C11 abstract machine, as far as it
 * describes memory that other processes write to, and on x86-64 they cost nothing: loads are made in program order, and
 * only the compiler is kept from reordering them. The loads of memcpy are made in program order too: glibc's versions
 * for large sizes use weakly ordered stores (to the batch, which no other process sees), but no weakly ordered loads.
 *
 * A helper thread makes its loads between an acquire load of `job.state`, after R2 of the caller, and a release store to
 * `job.finished`, which the caller acquires before R3. So they are ordered as if the caller had made them.
 */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

typedef int64_t word;

#define EMPTY INT64_MIN /* there is no trajectory */
#define NO_VERSION -1

enum { ID, START, LENGTH, LONGEST_SEGMENT, STEPS_BEFORE, POLICY_VERSION, PUBLISHED_AT, CHANGES, ROW_WORDS };

typedef struct { /* what is copied of each chunk to one output */
    const char *source;
    word step_bytes;
    word chunk_bytes;
    word per_trajectory; /* whether there is one value for each row of the ledger, which all steps repeat */
} column;

typedef struct { /* a request for batches of one size, and where everything is */
    const word *active, *counters, *rows;
    word counter_words, oldest_id, next_id, newest_version; /* size of a copy of the counters, and places in it */
    word num_rows;
    word count;         /* chunks of a batch */
    word length;        /* steps of a chunk */
    word first, extra;  /* a trajectory of T steps has T + extra offsets, from `first` on */
    word on_disk;       /* whether the steps lie in a file, so that a copy may have to wait for a disk */
    word num_columns;
    column columns[];
} plan;

/* A batch is at `base`; `targets` has the byte at which each of its columns begins, and then the ids and the steps. */

/* The draws of one batch: a header, then arrays of `count` words. */
enum { TODO_SIZE, CHUNKS, AGE_SUM, AGE_MAX, VERSIONED, LAG_SUM, LAG_MAX, HEADER_WORDS = 8 };
enum { IDS, STARTS, LENGTHS, VERSIONS, PUBLISHED, OFFSETS, TODO, MISSING };
#define ARRAY(draws, number) ((draws) + HEADER_WORDS + (number) * p->count)

#ifdef EVERY_LOAD /* a test decides what each load of shared memory returns */
word (*ec_every_load)(const word *);
static word load(const word *at) { return ec_every_load(at); }
static void copy(char *to, const char *from, word bytes) {
    for (word at = 0; at < bytes; at += sizeof(word)) *(word *)(to + at) = load((const word *)(from + at));
}
#define prefetch(at) ((void)(at))
#else
static inline word load(const word *at) {
    return atomic_load_explicit((const _Atomic word *)at, memory_order_acquire);
}
static inline void copy(char *to, const char *from, word bytes) { memcpy(to, from, bytes); }
#define prefetch(at) __builtin_prefetch(at)
#endif

static inline const word *row_of(const plan *p, word id) { return p->rows + id % p->num_rows * ROW_WORDS; }

/* R1: the live ids are [oldest, end). The loop ends as soon as no writer commits between its loads. */
void ec_live_range(const plan *p, word *oldest, word *end) {
    word active;
    do {
        active = load(p->active);
        const word *counters = p->counters + (active & 1) * p->counter_words;
        *oldest = load(counters + p->oldest_id);
        *end = load(counters + p->next_id);
    } while (load(p->active) != active);
}

/* R1, R2: draw a trajectory, and an offset in it, for each of the chunks that have none yet.
 *
 * The integer part of a number times the number of trajectories is the trajectory, and the fraction the offset. Returns
 * how many chunks drew a trajectory that does not fit or no longer exists, and so still have none; or EMPTY. */
word ec_draw(const plan *p, const double *numbers, word missing, word *draws) {
    word *ids = ARRAY(draws, IDS), *offsets = ARRAY(draws, OFFSETS), *list = ARRAY(draws, MISSING);
    word first, end, left = 0;
    if (!missing) { /* the beginning of a batch */
        missing = draws[TODO_SIZE] = p->count;
        for (word i = 0; i < p->count; i++) ARRAY(draws, TODO)[i] = list[i] = i;
    }
    ec_live_range(p, &first, &end);
    if (first == end) return EMPTY;
    const double trajectories = (double)(end - first);
    for (word k = 0; k < missing; k++) {
        ids[list[k]] = first + (word)(numbers[k] * trajectories);
        prefetch(row_of(p, ids[list[k]]));
    }
    for (word k = 0; k < missing; k++) {
        const word i = list[k], *row = row_of(p, ids[i]);
        const word start = load(row + START), length = load(row + LENGTH);
        ARRAY(draws, VERSIONS)[i] = load(row + POLICY_VERSION);
        ARRAY(draws, PUBLISHED)[i] = load(row + PUBLISHED_AT);
        if (load(row + ID) != ids[i] || length + p->extra < 1) {
            list[left++] = i;
            continue;
        }
        const double number = numbers[k] * trajectories;
        ARRAY(draws, STARTS)[i] = start;
        ARRAY(draws, LENGTHS)[i] = length;
        offsets[i] = (word)((number - (double)(ids[i] - first)) * (double)(length + p->extra)) + p->first;
    }
    return left;
}

typedef struct { /* the copies of a batch, in pieces that threads claim */
    const plan *p;
    const word *draws, *targets;
    char *base;
    word slices; /* pieces of a chunk, if it is large */
    word chunks; /* chunks of a piece, if they are small */
    word pieces;
} copies;

#define PIECE (256 * 1024)

static copies copies_of(const plan *p, const word *draws, char *base, const word *targets) {
    word bytes = 0, todo = draws[TODO_SIZE];
    for (word c = 0; c < p->num_columns; c++) bytes += p->columns[c].chunk_bytes;
    const word slices = bytes > PIECE ? bytes / PIECE : 1, chunks = bytes < PIECE ? PIECE / (bytes + 1) : 1;
    return (copies){p, draws, targets, base, slices, chunks, slices > 1 ? todo * slices : (todo + chunks - 1) / chunks};
}

/* Copy a slice of one chunk, of all columns. */
static void copy_chunk(const copies *job, word k, word slice) {
    const plan *p = job->p;
    const word i = ARRAY(job->draws, TODO)[k], step = ARRAY(job->draws, STARTS)[i] + ARRAY(job->draws, OFFSETS)[i];
    const word ahead = k + 1 < job->draws[TODO_SIZE] ? ARRAY(job->draws, TODO)[k + 1] : i;
    const word next = ARRAY(job->draws, STARTS)[ahead] + ARRAY(job->draws, OFFSETS)[ahead];
    for (word c = 0; c < p->num_columns; c++) {
        const column *of = p->columns + c;
        char *to = job->base + job->targets[c] + i * of->chunk_bytes;
        if (of->per_trajectory) {
            if (slice) continue;
            copy(to, of->source + ARRAY(job->draws, IDS)[i] % p->num_rows * of->step_bytes, of->step_bytes);
            for (word done = of->step_bytes; done < of->chunk_bytes; done *= 2) /* repeats what is in the batch */
                memcpy(to + done, to, done < of->chunk_bytes - done ? done : of->chunk_bytes - done);
        } else {
            const word begin = of->chunk_bytes * slice / job->slices & -64;
            const word end = slice + 1 == job->slices ? of->chunk_bytes : of->chunk_bytes * (slice + 1) / job->slices & -64;
            if (job->slices == 1) { /* the first cache lines of the next chunk; the processor finds the others */
                const char *from = of->source + next * of->step_bytes;
                for (word line = 0; line < of->chunk_bytes && line < 256; line += 64) prefetch(from + line);
            }
            copy(to + begin, of->source + step * of->step_bytes + begin, end - begin);
        }
    }
}

static void copy_piece(const copies *job, word piece) {
    if (job->slices > 1) {
        copy_chunk(job, piece / job->slices, piece % job->slices);
        return;
    }
    const word todo = job->draws[TODO_SIZE], end = (piece + 1) * job->chunks;
    for (word k = piece * job->chunks; k < todo && k < end; k++) copy_chunk(job, k, 0);
}

/* ------------------------------------------------------------------------------------------------ helper threads
 *
 * Helpers are detached threads that sleep until a caller offers its copies. Caller and helpers claim pieces by increasing
 * a counter. So the caller never waits for a helper that has not begun a piece: it claims all pieces that nobody else
 * has, and waits only for those that are being copied. One caller has helpers at a time; others copy alone meanwhile.
 *
 * `state` has three parts: the number of the offer (32 bits), its pieces, and how many of them are claimed (16 bits each).
 * A piece is claimed by compare-and-swap of the whole word. So it belongs to the current offer; and as long as it is not
 * finished, the caller stays in its call, and `offered` does not change.
 *
 * A helper that has to wait for a processor holds up the caller. If that takes long, or if no helper begins in time, the
 * following calls offer nothing, twice as many each time.
 */
#if defined(__linux__) && !defined(EVERY_LOAD)
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_HELPERS 3
#define MOST_PIECES 0xffff
#define LONGEST_PAUSE 256 /* calls */

static struct {
    _Atomic uint64_t state;
    _Atomic uint32_t finished; /* pieces that helpers have finished; a futex */
    _Atomic uint32_t waiting;  /* whether the caller sleeps until `finished` changes */
    _Atomic uint32_t offers;   /* a futex that helpers sleep on */
    _Atomic uint32_t taken;    /* whether a caller has the helpers; it alone changes what follows */
    copies offered;
    uint32_t helpers, pause, paused;
    int forked, registered;
} pool;

static void futex_wait(_Atomic uint32_t *at, uint32_t value) {
    syscall(SYS_futex, at, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *at, uint32_t threads) {
    syscall(SYS_futex, at, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

/* Claim a piece of the current offer; return -1 if all are claimed. */
static word claim(void) {
    uint64_t state = atomic_load_explicit(&pool.state, memory_order_acquire);
    while ((state & 0xffff) < (state >> 16 & 0xffff))
        if (atomic_compare_exchange_weak_explicit(&pool.state, &state, state + 1, memory_order_acq_rel,
                                                  memory_order_acquire))
            return state & 0xffff;
    return -1;
}

static void *help(void *unused) {
    for (;;) {
        const uint32_t seen = atomic_load(&pool.offers);
        word piece;
        while ((piece = claim()) >= 0) {
            copy_piece(&pool.offered, piece);
            atomic_fetch_add(&pool.finished, 1); /* releases the loads and stores of the copy */
            if (atomic_load(&pool.waiting)) futex_wake(&pool.finished, 1);
        }
        futex_wait(&pool.offers, seen);
    }
    return unused;
}

/* In a forked child there are no helpers, and whoever had them is not there either. */
static void forget_in_child(void) {
    memset(&pool, 0, sizeof pool);
    pool.forked = pool.registered = 1;
}

static void start_helper(void) {
    pthread_attr_t detached;
    pthread_t thread;
    sigset_t all, before;
    if (!pool.registered && pthread_atfork(NULL, NULL, forget_in_child)) return;
    pool.registered = 1;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&detached, 128 * 1024);
    sigfillset(&all); /* signals are for the threads of Python */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (!pthread_create(&thread, &detached, help, NULL)) pool.helpers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
}

/* Copy with at most `threads` threads, this one included; return whether it was done. */
static int run_with_helpers(const copies *job, word threads) {
    uint32_t nobody = 0;
    if (job->pieces > MOST_PIECES || pool.forked) return 0;
    if (!atomic_compare_exchange_strong(&pool.taken, &nobody, 1)) return 0;
    if (pool.paused) {
        pool.paused--;
        atomic_store(&pool.taken, 0);
        return 0;
    }
    const word helpers = threads - 1 < MOST_HELPERS ? threads - 1 : MOST_HELPERS;
    while (pool.helpers < helpers) {
        const uint32_t before = pool.helpers;
        start_helper();
        if (pool.helpers == before) break;
    }
    const int64_t begin = nanoseconds();
    pool.offered = *job;
    atomic_store(&pool.finished, 0);
    const uint64_t offer = (atomic_load(&pool.state) >> 32) + 1;
    atomic_store(&pool.state, offer << 32 | (uint64_t)job->pieces << 16);
    atomic_fetch_add(&pool.offers, 1);
    futex_wake(&pool.offers, (uint32_t)helpers);
    word piece, own = 0;
    while ((piece = claim()) >= 0) copy_piece(job, piece), own++;
    const uint32_t others = (uint32_t)(job->pieces - own);
    const int64_t copied = nanoseconds();
    for (int tries = 0; atomic_load(&pool.finished) != others; tries++) {
        if (tries < 1000) {
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
            continue;
        }
        atomic_store(&pool.waiting, 1);
        const uint32_t finished = atomic_load(&pool.finished);
        if (finished != others) futex_wait(&pool.finished, finished);
        atomic_store(&pool.waiting, 0);
    }
    if (!others || nanoseconds() - copied > (copied - begin) / 4)
        pool.paused = pool.pause = pool.pause * 2 + 1 < LONGEST_PAUSE ? pool.pause * 2 + 1 : LONGEST_PAUSE;
    else
        pool.pause = 0;
    atomic_store(&pool.taken, 0);
    return 1;
}
#else
static int run_with_helpers(const copies *job, word threads) { return 0; }
#endif

/* ------------------------------------------------------------------------------------------------- reading a disk
 *
 * A copy from a file waits for one page fault after the other. So all chunks of a batch are announced to the kernel
 * before the first is copied, and the disk reads them together. An announcement of pages that are in memory already is
 * a system call for nothing. So a thread stops announcing when its last batches have read nothing from a disk: several,
 * because it may sample two buffers in turn. `shared/read_ahead.py` does the same for other requests.
 */
#define PATIENCE 16 /* batches */

#if defined(__linux__) && !defined(EVERY_LOAD)
#include <sys/mman.h>
#include <sys/resource.h>

#define ANNOUNCED (128 * 1024) /* bytes of an announcement; what goes beyond the device's limit would be ignored */

static _Thread_local int idle; /* batches of this thread since the last one that read something from a disk */

static word blocks_read(void) {
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) ? 0 : usage.ru_inblock + usage.ru_majflt;
}

static void announce(const plan *p, const word *draws) {
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    for (word k = 0; k < draws[TODO_SIZE]; k++) {
        const word i = ARRAY(draws, TODO)[k], step = ARRAY(draws, STARTS)[i] + ARRAY(draws, OFFSETS)[i];
        for (word c = 0; c < p->num_columns; c++) {
            const column *of = p->columns + c;
            if (of->per_trajectory) continue;
            const uintptr_t from = (uintptr_t)(of->source + step * of->step_bytes), end = from + of->chunk_bytes;
            for (uintptr_t at = from & -page; at < end; at += ANNOUNCED)
                madvise((void *)at, end - at < ANNOUNCED ? end - at : ANNOUNCED, MADV_WILLNEED); /* a hint: may fail */
        }
    }
}
#else
static int idle;
static word blocks_read(void) { return 0; }
static void announce(const plan *p, const word *draws) { (void)p, (void)draws; }
#endif

/* ------------------------------------------------------------------------------------------------- copy and check */

/* R3, first half: copy the chunks that are drawn but not copied yet. */
void ec_gather(const plan *p, const word *draws, char *base, const word *targets, word threads) {
    const copies job = copies_of(p, draws, base, targets);
    const word before = p->on_disk ? blocks_read() : 0;
    if (p->on_disk && idle < PATIENCE) announce(p, draws);
    if (threads <= 1 || job.pieces <= 1 || !run_with_helpers(&job, threads))
        for (word piece = 0; piece < job.pieces; piece++) copy_piece(&job, piece);
    if (p->on_disk) idle = blocks_read() != before ? 0 : idle < PATIENCE ? idle + 1 : PATIENCE;
}

/* Write the trajectory id and the step of each step of the copied chunks, two arrays [count, length]. */
void ec_index(const plan *p, const word *draws, char *base, const word *targets) {
    word *all_ids = (word *)(base + targets[p->num_columns]), *all_steps = (word *)(base + targets[p->num_columns + 1]);
    for (word k = 0; k < draws[TODO_SIZE]; k++) {
        const word i = ARRAY(draws, TODO)[k], id = ARRAY(draws, IDS)[i], offset = ARRAY(draws, OFFSETS)[i];
        word *ids = all_ids + i * p->length, *steps = all_steps + i * p->length;
        for (word t = 0; t < p->length; t++) ids[t] = id;
        for (word t = 0; t < p->length; t++) steps[t] = offset + t;
    }
}

/* R3, second half: return minus the number of chunks whose trajectory was evicted meanwhile. They are to be drawn again.
 *
 * If there is none, note the ages of the chunks. */
word ec_check(const plan *p, word *draws) {
    const word *ids = ARRAY(draws, IDS);
    word torn = 0;
    atomic_thread_fence(memory_order_acquire); /* all copies are made before the ids are loaded again */
    for (word i = 0; i < p->count; i++)
        if (load(row_of(p, ids[i]) + ID) != ids[i]) ARRAY(draws, TODO)[torn] = ARRAY(draws, MISSING)[torn] = i, torn++;
    draws[TODO_SIZE] = torn;
    if (torn) return -torn;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now); /* the clock of time.monotonic_ns() on Linux */
    const word moment = now.tv_sec * (word)1000000000 + now.tv_nsec;
    word active, newest;
    do {
        active = load(p->active);
        newest = load(p->counters + (active & 1) * p->counter_words + p->newest_version);
    } while (load(p->active) != active);
    memset(draws + CHUNKS, 0, (HEADER_WORDS - CHUNKS) * sizeof(word));
    draws[CHUNKS] = p->count;
    for (word i = 0; i < p->count; i++) {
        const word age = moment - ARRAY(draws, PUBLISHED)[i], version = ARRAY(draws, VERSIONS)[i];
        draws[AGE_SUM] += age;
        if (age > draws[AGE_MAX]) draws[AGE_MAX] = age;
        if (version == NO_VERSION) continue;
        const word lag = newest > version ? newest - version : 0;
        draws[VERSIONED]++;
        draws[LAG_SUM] += lag;
        if (lag > draws[LAG_MAX]) draws[LAG_MAX] = lag;
    }
    return 0;
}

/* Copy and check what is drawn; return 0 if the batch is whole, else minus the number of chunks to draw again. */
word ec_copy(const plan *p, word *draws, char *base, const word *targets, word threads) {
    ec_gather(p, draws, base, targets, threads);
    ec_index(p, draws, base, targets);
    return ec_check(p, draws);
}

/* All of it. Returns what ec_draw returns if that is not 0, and what ec_copy returns otherwise. */
word ec_sample(const plan *p, const double *numbers, word missing, word *draws, char *base, const word *targets,
               word threads) {
    const word left = ec_draw(p, numbers, missing, draws);
    return left ? left : ec_copy(p, draws, base, targets, threads);
}

/* The first numbers of the Mersenne twisters (MT19937) that are seeded with `seeds`, as torch's generators draw them:
 * FIRST_NUMBERS of each, one after the other.
 *
 * The state of a twister is 624 words, made one by one. Its first outputs depend on some of the first ones, and on those
 * 397 places later. So the others are not kept, and the state is not completed. Several seeds at a time, because each
 * word depends on the one before. */
#define FIRST_NUMBERS 8
#define OUTPUTS (2 * FIRST_NUMBERS)
#define SEEDS_AT_ONCE 8

void ec_first_numbers(const word *seeds, word count, double *numbers) {
    for (word begin = 0; begin < count; begin += SEEDS_AT_ONCE) {
        const word some = count - begin < SEEDS_AT_ONCE ? count - begin : SEEDS_AT_ONCE;
        uint32_t state[SEEDS_AT_ONCE], low[OUTPUTS + 1][SEEDS_AT_ONCE], high[OUTPUTS][SEEDS_AT_ONCE];
        for (word k = 0; k < SEEDS_AT_ONCE; k++) state[k] = low[0][k] = (uint32_t)seeds[begin + (k < some ? k : 0)];
        for (uint32_t i = 1; i < 397 + OUTPUTS; i++) {
            for (word k = 0; k < SEEDS_AT_ONCE; k++) state[k] = 1812433253u * (state[k] ^ state[k] >> 30) + i;
            if (i <= OUTPUTS) memcpy(low[i], state, sizeof state);
            if (i >= 397) memcpy(high[i - 397], state, sizeof state);
        }
        for (word k = 0; k < some; k++)
            for (word n = 0; n < FIRST_NUMBERS; n++) {
                uint64_t both = 0; /* of each pair of outputs, the first is the upper one */
                for (word i = 2 * n; i < 2 * n + 2; i++) {
                    const uint32_t mixed = (low[i][k] & 0x80000000u) | (low[i + 1][k] & 0x7fffffffu);
                    uint32_t out = high[i][k] ^ mixed >> 1 ^ (low[i + 1][k] & 1 ? 0x9908b0dfu : 0);
                    out ^= out >> 11;
                    out ^= out << 7 & 0x9d2c5680u;
                    out ^= out << 15 & 0xefc60000u;
                    both = both << 32 | (out ^ out >> 18);
                }
                numbers[(begin + k) * FIRST_NUMBERS + n] = (double)(both & ((1ull << 53) - 1)) * 0x1p-53;
            }
    }
}

/* The checksum of the source that this was compiled from. */
uint32_t ec_source(void) {
#ifdef SOURCE_CHECKSUM
    return SOURCE_CHECKSUM;
#else
    return 0;
#endif
}
