/* A CUDA driver whose devices are host memory and threads: for tests of code that drives streams.
 *
 * Real: contexts (a stack per thread, primary contexts counted), streams (a worker thread each, so
 * that nothing has happened until somebody waits), events and their times, pinned and device
 * memory, copies, CUDA graphs of what one stream captured. Not there: kernels of the CUDA kind; in
 * their place `fakecuda_launch` runs a host function in stream order. All else that cuda.h declares
 * answers CUDA_ERROR_NOT_SUPPORTED (see build.py).
 *
 * A device has one copy engine per direction and one compute engine. An operation begins when the
 * one before it in its stream has ended and its engine is free, and takes the time that is set for
 * it. These times are kept on a timeline of their own: a sleep that ends late delays nothing else.
 * With "hosts" set, that timeline is simulated: nobody sleeps, and it goes on to the next end of an
 * operation once so many threads of the host wait for events, as if they took no time themselves.
 *
 * As on a card: pageable memory is copied while the caller waits; the null stream and blocking
 * streams wait for each other; an event that is recorded during a capture is seen by nobody outside
 * the graph, unless it is recorded as an external one. Stricter where that finds mistakes: a device
 * pointer must be inside an allocation; new memory holds 0xA5; memory freed while a queued copy
 * uses it is counted (`frees_while_busy`) and kept; to wait for an event that a graph records is to
 * wait for nothing, as long as the launch has not come to its node (CUDA's documents leave it open).
 *
 * What breaks a capture, as documented of cuStreamBeginCapture and cuThreadExchangeStreamCaptureMode
 * and in the guide's chapter on prohibited operations; the call answers 900, cuStreamEndCapture 901:
 *   any mode          a thread waits for the whole context (seen: NVIDIA/TensorRT issue 2888), or for
 *                     the stream that captures, or asks it
 *   global            any thread allocates, frees, asks an event, copies and waits
 *   thread-local      so does the thread that captures; others may do it
 *   relaxed           nobody is kept from it
 * The legacy stream is told 906 while a blocking stream captures.
 *
 * cuda.h says of cuCtxPushCurrent and cuCtxPopCurrent that they may answer errors of what was
 * launched before; with "switch_fails" set they do: nothing is pushed then, but popped.
 *
 * Environment, read at cuInit:
 *   FAKECUDA_DEVICES        devices (1), of which CUDA_VISIBLE_DEVICES shows some
 *   FAKECUDA_MEMORY_MB      memory of each (8192); cuMemAlloc beyond it answers OUT_OF_MEMORY
 *   FAKECUDA_NS_PER_BYTE    time of a copy between host and device (0: as long as it takes)
 *   FAKECUDA_KERNEL_US      least time of a kernel (0: as long as its function takes)
 *   FAKECUDA_FAIL_CALL      from this call of the API on, counted from 1, the device has failed
 *   FAKECUDA_FAIL_KERNEL    so it has from this kernel on, when its turn comes
 *   FAKECUDA_SWITCH_FAILS   whether a push and a pop answer that, too (0)
 *   FAKECUDA_FAIL_CODE      with this error (700, an illegal address), which stays
 *   FAKECUDA_STATS          a file that gets all counts as JSON when the process exits
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_DEVICES 16

typedef int (*host_kernel)(void *);

/* --- what is counted ------------------------------------------------------------------------- */

#define COUNTS(X)                                                                                  \
    X(calls) X(contexts) X(primary_retains) X(streams) X(events) X(graphs) X(graph_execs)          \
    X(device_allocations) X(device_bytes) X(pinned_allocations) X(pinned_bytes)                    \
    X(kernels) X(copies_h2d) X(copies_d2h) X(bytes_h2d) X(bytes_d2h) X(pageable_copies)            \
    X(graph_launches) X(graph_uploads) X(frees_while_busy) X(peak_device_bytes)                                     \
    X(h2d_us) X(d2h_us) X(kernel_us) X(blocking_waits) X(spinning_waits)

#define DECLARE(name) long long name;
static struct { COUNTS(DECLARE) } counts;

/* --- state ----------------------------------------------------------------------------------- */

typedef struct {
    uint64_t next, serving; /* tickets: first come, first served */
    double free_at;         /* on the timeline, seconds */
} Engine;

enum { H2D, D2H, COMPUTE, ENGINES };

typedef struct {
    int alive, device, retains;
    unsigned flags;
} Context;

typedef struct {
    Engine engines[ENGINES];
    size_t used;
    Context primary;
} Device;

typedef struct Event {
    struct Event *next_event;
    unsigned flags;
    int users, dead; /* queued operations that name it */
    uint64_t recorded, done;
    double at; /* timeline */
} Event;

enum Kind { COPY, FILL, KERNEL, HOST, RECORD, WAIT };

typedef struct Op {
    struct Op *next;
    enum Kind kind;
    int engine; /* -1: none */
    void *to;
    const void *from;
    size_t size;
    uint32_t value;
    int width; /* of a fill's element */
    host_kernel kernel;
    CUhostFn host;
    void *arg;
    double least_s;
    Event *event;
    uint64_t seq;
    int external; /* a record that is seen outside its graph */
    int in_graph;
    uint64_t number; /* in the order of all calls */
    double queued_at;
} Op;

typedef struct Graph {
    struct Graph *next_graph;
    Op *first, *last;
    int is_exec;
} Graph;

typedef struct Stream {
    struct Stream *next_stream;
    int device, closing;
    unsigned flags;
    pthread_cond_t wake;
    Op *head, *tail;
    uint64_t queued, finished;
    double clock; /* timeline: the end of its last operation */
    double asleep_until; /* simulated; 0: it is not asleep */
    Engine *held_by; /* the engine that it waits for, with this ticket */
    uint64_t ticket;
    Graph *capture;
    CUstreamCaptureMode mode;
    int capture_broken;
    pthread_t capturer;
} Stream;

typedef struct Block {
    struct Block *next_block;
    char *start;
    size_t size;
    int device; /* -1: pinned host memory */
    int registered;
} Block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static uint64_t numbered;
static int initialised, device_count, visible[MAX_DEVICES];
static Device devices[MAX_DEVICES];
static Stream *streams, *null_streams[MAX_DEVICES];
static Event *events;
static Block *blocks;
static Graph *graphs;
static int sticky, fail_code = 700;
static long long fail_call, fail_kernel;
static size_t memory;
static int switch_fails;
static double ns_per_byte, kernel_us, graph_bytes;
static __thread Context **stack; /* deep: releasing a primary context leaves it there */
static __thread int depth, room;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void sleep_until(double when) {
    struct timespec t = {(time_t)when, (long)((when - (time_t)when) * 1e9)};
    if (when > now())
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL)) {
        }
}

/* A thread of the host that waits for an event. */
typedef struct Waiter {
    struct Waiter *next_waiter;
    const Event *event;
    uint64_t target;
} Waiter;

static Waiter *waiters;
static int hosts; /* 0: the timeline is that of the clock */
static double simulated;

static double timeline(void) { return hosts ? simulated : now(); }

/* Let the simulated timeline go on to the next end of an operation, if there is nobody who may
 * still do something before that; with the lock held. */
static void go_on(void) {
    double next = 0;
    int waiting = 0;
    if (!hosts || sticky)
        return;
    for (Waiter *w = waiters; w; w = w->next_waiter, waiting++)
        if (w->event->done >= w->target)
            return;
    if (waiting < hosts)
        return;
    for (Stream *s = streams; s; s = s->next_stream) {
        if (s->asleep_until) {
            if (s->asleep_until <= simulated)
                return;
            if (!next || s->asleep_until < next)
                next = s->asleep_until;
        } else if (s->head && !(s->held_by && s->held_by->serving != s->ticket))
            return;
    }
    if (next) {
        simulated = next;
        pthread_cond_broadcast(&changed);
    }
}

static double setting(const char *name, double otherwise) {
    const char *text = getenv(name);
    return text && *text ? atof(text) : otherwise;
}

/* --- the gate of every call ------------------------------------------------------------------ */

static Context *current(void) { return depth ? stack[depth - 1] : NULL; }

static CUresult enter(int needs_context) {
    pthread_mutex_lock(&lock);
    counts.calls++;
    if (fail_call && counts.calls >= fail_call && !sticky) {
        sticky = fail_code;
        pthread_cond_broadcast(&changed);
    }
    CUresult answer = sticky;
    if (!initialised)
        answer = CUDA_ERROR_NOT_INITIALIZED;
    else if (!sticky && needs_context && !current())
        answer = CUDA_ERROR_INVALID_CONTEXT;
    else if (!sticky && needs_context && !current()->alive)
        answer = CUDA_ERROR_CONTEXT_IS_DESTROYED;
    pthread_mutex_unlock(&lock);
    return answer;
}

#define ENTER(needs_context)                                                                       \
    do {                                                                                           \
        CUresult refused = enter(needs_context);                                                   \
        if (refused)                                                                               \
            return refused;                                                                        \
    } while (0)

static CUresult leave(CUresult answer) {
    pthread_mutex_unlock(&lock);
    return answer;
}

static void fail(int code) {
    pthread_mutex_lock(&lock);
    sticky = code;
    pthread_cond_broadcast(&changed);
    for (Stream *s = streams; s; s = s->next_stream)
        pthread_cond_broadcast(&s->wake);
    pthread_mutex_unlock(&lock);
}

/* --- memory ---------------------------------------------------------------------------------- */

/* The block that holds `size` bytes from `start` on; with the lock held. */
static Block *holder(const void *start, size_t size) {
    for (Block *b = blocks; b; b = b->next_block)
        if ((char *)start >= b->start && (char *)start + size <= b->start + b->size)
            return b;
    return NULL;
}

static int touches(const Op *op, const Block *b) {
    const char *to = op->to, *from = op->from;
    return (to && to >= b->start && to < b->start + b->size) ||
           (from && from >= b->start && from < b->start + b->size);
}

static int is_busy(const Block *b) {
    for (Stream *s = streams; s; s = s->next_stream)
        for (Op *op = s->head; op; op = op->next)
            if (touches(op, b))
                return 1;
    return 0;
}

/* Whether a call that allocates, frees, asks an event or copies and waits breaks a capture, which it
 * has done then: see above. With the lock held. */
static int breaks_capture(void) {
    int broken = 0;
    for (Stream *s = streams; s; s = s->next_stream)
        if (s->capture && s->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
            (s->mode == CU_STREAM_CAPTURE_MODE_GLOBAL ||
             pthread_equal(s->capturer, pthread_self())))
            broken = s->capture_broken = 1;
    return broken;
}

static CUresult allocate(void **out, size_t size, int device) {
    pthread_mutex_lock(&lock);
    if (breaks_capture())
        return leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (!size)
        return leave(CUDA_ERROR_INVALID_VALUE);
    if (device >= 0 && devices[device].used + size > memory)
        return leave(CUDA_ERROR_OUT_OF_MEMORY);
    Block *b = calloc(1, sizeof *b);
    void *start = NULL;
    if (!b || posix_memalign(&start, 4096, size)) {
        free(b);
        return leave(CUDA_ERROR_OUT_OF_MEMORY);
    }
    if (size <= 16 << 20)
        memset(start, 0xA5, size);
    *b = (Block){blocks, start, size, device, 0};
    blocks = b;
    *out = start;
    if (device >= 0) {
        devices[device].used += size;
        counts.device_allocations++;
        counts.device_bytes += size;
        if (counts.device_bytes > counts.peak_device_bytes)
            counts.peak_device_bytes = counts.device_bytes;
    } else {
        counts.pinned_allocations++;
        counts.pinned_bytes += size;
    }
    return leave(CUDA_SUCCESS);
}

static CUresult release(void *start, int pinned, int registered) {
    pthread_mutex_lock(&lock);
    if (breaks_capture())
        return leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    for (Block **at = &blocks; *at; at = &(*at)->next_block) {
        Block *b = *at;
        if (b->start != start || (b->device < 0) != pinned || b->registered != registered)
            continue;
        if (b->device >= 0) {
            devices[b->device].used -= b->size;
            counts.device_allocations--;
            counts.device_bytes -= b->size;
        } else {
            counts.pinned_allocations--;
            counts.pinned_bytes -= b->size;
        }
        *at = b->next_block;
        if (is_busy(b))
            counts.frees_while_busy++;
        else if (!registered)
            free(b->start);
        free(b);
        return leave(CUDA_SUCCESS);
    }
    return leave(CUDA_ERROR_INVALID_VALUE);
}

/* --- streams --------------------------------------------------------------------------------- */

static void put_event(Event *e) {
    if (!e->dead || e->users)
        return;
    for (Event **at = &events; *at; at = &(*at)->next_event)
        if (*at == e) {
            *at = e->next_event;
            break;
        }
    free(e);
}

static void fill(const Op *op) {
    for (size_t n = 0; n < op->size; n++)
        memcpy((char *)op->to + n * op->width, &op->value, op->width);
}

/* Do the work of `op`; nothing of it if the device has failed. */
static void work(Op *op) {
    int error = 0;
    if (sticky)
        return;
    if (op->kind == COPY)
        memmove(op->to, op->from, op->size);
    else if (op->kind == FILL)
        fill(op);
    else if (op->kind == HOST)
        op->host(op->arg);
    else {
        pthread_mutex_lock(&lock);
        long long number = ++counts.kernels;
        pthread_mutex_unlock(&lock);
        if (fail_kernel && number >= fail_kernel)
            error = fail_code;
        else if (op->kernel)
            error = op->kernel(op->arg);
    }
    if (error)
        fail(error);
}

static void count_copy(const Op *op, double seconds) {
    long long us = (long long)(seconds * 1e6);
    if (op->engine == H2D) {
        counts.copies_h2d++, counts.bytes_h2d += op->size, counts.h2d_us += us;
    } else if (op->engine == D2H) {
        counts.copies_d2h++, counts.bytes_d2h += op->size, counts.d2h_us += us;
    } else if (op->engine == COMPUTE) {
        counts.kernel_us += us;
    }
}

/* The stream that `s`, of which `op` is next, has to wait for; NULL if none. With the lock held. */
static Stream *ahead(const Stream *s, const Op *op, double *begin) {
    if (s->flags & CU_STREAM_NON_BLOCKING)
        return NULL;
    for (Stream *t = streams; t; t = t->next_stream) {
        int null_one = s == null_streams[s->device] || t == null_streams[s->device];
        if (t == s || t->device != s->device || !null_one || (t->flags & CU_STREAM_NON_BLOCKING))
            continue;
        if (t->head && t->head->number < op->number)
            return t;
        if (t->clock > *begin)
            *begin = t->clock;
    }
    return NULL;
}

static void run(Stream *s, Op *op) {
    double begin = s->clock > op->queued_at ? s->clock : op->queued_at;
    pthread_mutex_lock(&lock);
    while (!sticky && ahead(s, op, &begin))
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    if (op->kind == RECORD || op->kind == WAIT) {
        pthread_mutex_lock(&lock);
        Event *e = op->event;
        if (op->kind == RECORD) {
            if (op->in_graph)
                op->seq = ++e->recorded;
            if (op->seq > e->done)
                e->done = op->seq, e->at = begin;
            pthread_cond_broadcast(&changed);
        } else {
            while (e->done < op->seq && !sticky)
                pthread_cond_wait(&changed, &lock);
            if (e->at > begin)
                begin = e->at;
        }
        s->clock = begin;
        pthread_mutex_unlock(&lock);
        return;
    }
    Engine *engine = op->engine < 0 ? NULL : &devices[s->device].engines[op->engine];
    if (engine) {
        pthread_mutex_lock(&lock);
        s->ticket = engine->next++;
        s->held_by = engine;
        while (engine->serving != s->ticket) {
            go_on();
            pthread_cond_wait(&changed, &lock);
        }
        s->held_by = NULL;
        if (engine->free_at > begin)
            begin = engine->free_at;
        pthread_mutex_unlock(&lock);
    }
    double began = now();
    work(op);
    double end = begin + (hosts ? 0 : now() - began);
    if (end < begin + op->least_s)
        end = begin + op->least_s;
    if (!sticky && !hosts)
        sleep_until(end);
    pthread_mutex_lock(&lock);
    s->asleep_until = end;
    while (hosts && simulated < end && !sticky) {
        double before = simulated;
        go_on();
        if (simulated == before)
            pthread_cond_wait(&changed, &lock);
    }
    s->asleep_until = 0;
    s->clock = end;
    if (engine) {
        engine->free_at = end;
        engine->serving++;
        count_copy(op, end - begin);
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void *serve(void *given) {
    Stream *s = given;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!s->head && !s->closing)
            pthread_cond_wait(&s->wake, &lock);
        Op *op = s->head;
        if (!op)
            break;
        /* It stays at the head while it runs, so that its memory counts as busy. */
        pthread_mutex_unlock(&lock);
        run(s, op);
        pthread_mutex_lock(&lock);
        s->head = op->next;
        if (!s->head)
            s->tail = NULL;
        s->finished++;
        if (op->event) {
            op->event->users--;
            put_event(op->event);
        }
        free(op);
        pthread_cond_broadcast(&changed);
    }
    for (Stream **at = &streams; *at; at = &(*at)->next_stream)
        if (*at == s) {
            *at = s->next_stream;
            break;
        }
    pthread_mutex_unlock(&lock);
    pthread_cond_destroy(&s->wake);
    free(s);
    return NULL;
}

/* With the lock held. */
static Stream *open_stream(int device, unsigned flags) {
    Stream *s = calloc(1, sizeof *s);
    pthread_t thread;
    if (!s)
        return NULL;
    s->device = device;
    s->flags = flags;
    pthread_cond_init(&s->wake, NULL);
    if (pthread_create(&thread, NULL, serve, s)) {
        free(s);
        return NULL;
    }
    pthread_detach(thread);
    s->next_stream = streams;
    streams = s;
    return s;
}

static int is_null(CUstream h) {
    return !h || h == CU_STREAM_LEGACY || h == CU_STREAM_PER_THREAD;
}

/* The stream that `h` stands for, NULL if none; with the lock held and a current context. */
static Stream *find_stream(CUstream h) {
    if (is_null(h)) {
        int device = current()->device;
        if (!null_streams[device])
            null_streams[device] = open_stream(device, 0);
        return null_streams[device];
    }
    for (Stream *s = streams; s; s = s->next_stream)
        if (s == (Stream *)h && !s->closing)
            return s;
    return NULL;
}

static Event *find_event(CUevent h) {
    for (Event *e = events; e; e = e->next_event)
        if (e == (Event *)h && !e->dead)
            return e;
    return NULL;
}

/* Wait for what is queued by now; with the lock held. */
static CUresult drain(Stream *s) {
    uint64_t target = s->queued;
    while (s->finished < target)
        pthread_cond_wait(&changed, &lock);
    return sticky;
}

static CUresult drain_device(int device, int blocking_only) {
    for (;;) {
        Stream *busy = NULL;
        for (Stream *s = streams; s && !busy; s = s->next_stream)
            if (s->device == device && s->head &&
                !(blocking_only && (s->flags & CU_STREAM_NON_BLOCKING)))
                busy = s;
        if (!busy)
            return sticky;
        pthread_cond_wait(&changed, &lock);
    }
}

/* Queue a copy of `made` on `h`, or add it to what it captures. `waits`: until it is done. */
static CUresult submit(CUstream h, const Op *made, int waits) {
    pthread_mutex_lock(&lock);
    Stream *s = find_stream(h);
    if (!s)
        return leave(CUDA_ERROR_INVALID_HANDLE);
    if (waits && (s->capture || (is_null(h) && breaks_capture()))) {
        s->capture_broken = s->capture != NULL;
        return leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    for (Stream *t = is_null(h) ? streams : NULL; t; t = t->next_stream)
        if (t->capture && t->device == s->device && !(t->flags & CU_STREAM_NON_BLOCKING)) {
            t->capture_broken = 1;
            return leave(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        }
    if (made->event && !find_event((CUevent)made->event))
        return leave(CUDA_ERROR_INVALID_HANDLE);
    if (s->capture && made->event && !made->external)
        return leave(CUDA_SUCCESS); /* One stream's order is all the edges there are. */
    Op *op = malloc(sizeof *op);
    *op = *made;
    op->next = NULL;
    op->number = ++numbered;
    op->queued_at = timeline();
    if (s->capture) {
        if (s->capture->last)
            s->capture->last->next = op;
        else
            s->capture->first = op;
        s->capture->last = op;
        return leave(CUDA_SUCCESS);
    }
    if (op->event) {
        op->event->users++;
        op->seq = op->kind == RECORD && !op->in_graph ? ++op->event->recorded : op->event->recorded;
    }
    if (s->tail)
        s->tail->next = op;
    else
        s->head = op;
    s->tail = op;
    s->queued++;
    pthread_cond_broadcast(&s->wake);
    return leave(waits ? drain(s) : CUDA_SUCCESS);
}

static CUresult copy(void *to, const void *from, size_t size, int engine, CUstream h, int waits) {
    Op op = {.kind = COPY, .engine = engine, .to = to, .from = from, .size = size};
    op.least_s = engine == COMPUTE ? 0 : size * ns_per_byte * 1e-9;
    if (!size)
        return CUDA_SUCCESS;
    pthread_mutex_lock(&lock);
    int good = (engine == H2D || holder(from, size)) && (engine == D2H || holder(to, size));
    const void *host = engine == H2D ? from : to;
    if (engine != COMPUTE && good && !holder(host, size)) {
        counts.pageable_copies += !waits;
        waits = 1;
    }
    pthread_mutex_unlock(&lock);
    return good ? submit(h, &op, waits) : CUDA_ERROR_INVALID_VALUE;
}

static CUresult set(CUdeviceptr to, uint32_t value, int width, size_t size, CUstream h, int waits) {
    Op op = {.kind = FILL, .engine = COMPUTE, .to = (void *)to, .value = value, .width = width,
             .size = size};
    pthread_mutex_lock(&lock);
    int good = holder((void *)to, size * width) != NULL;
    pthread_mutex_unlock(&lock);
    return good ? submit(h, &op, waits) : CUDA_ERROR_INVALID_VALUE;
}

/* --- for tests ------------------------------------------------------------------------------- */

/* Run `kernel(arg)`, which may be NULL, in the order of `stream`, alone on its device's compute
 * engine, for `microseconds` at least (below 0: as FAKECUDA_KERNEL_US says). What it answers other
 * than 0 is the device's error from then on. */
EXPORT int fakecuda_launch_us(CUstream stream, host_kernel kernel, void *arg, double microseconds) {
    ENTER(1);
    double us = microseconds < 0 ? kernel_us : microseconds;
    Op op = {.kind = KERNEL, .engine = COMPUTE, .kernel = kernel, .arg = arg, .least_s = us * 1e-6};
    return submit(stream, &op, 0);
}

EXPORT int fakecuda_launch(CUstream stream, host_kernel kernel, void *arg) {
    return fakecuda_launch_us(stream, kernel, arg, -1);
}

/* From now on every call answers `code`; 0: all is well again. */
EXPORT void fakecuda_fail(int code) {
    if (!code)
        fail_call = fail_kernel = 0;
    fail(code);
}

/* The count `name` (see COUNTS), -1 if there is none. Existing things, or totals, or bytes, or
 * microseconds that an engine was busy. */
EXPORT long long fakecuda_count(const char *name) {
    long long found = -1;
    pthread_mutex_lock(&lock);
#define FIND(each)                                                                                 \
    if (!strcmp(name, #each))                                                                      \
        found = counts.each;
    COUNTS(FIND)
    if (!strcmp(name, "timeline_us"))
        found = (long long)(timeline() * 1e6);
    pthread_mutex_unlock(&lock);
    return found;
}

/* Have the timeline simulated for so many threads of the host; 0: not any more. With the lock. */
static void set_hosts(int count) {
    double present = now();
    if (!hosts)
        simulated = present;
    hosts = count;
    for (Stream *s = count ? NULL : streams; s; s = s->next_stream)
        s->clock = present;
    for (int n = 0; !count && n < device_count; n++)
        for (int each = 0; each < ENGINES; each++)
            devices[n].engines[each].free_at = present;
    pthread_cond_broadcast(&changed);
}

/* Change "ns_per_byte", "kernel_us" or "memory_mb" of what is queued from now on, or "hosts", while
 * nothing is queued; or "graph_bytes": to launch a graph that copies more answers OUT_OF_MEMORY, 0:
 * none does; or "switch_fails". 0, or -1 if there is no such setting. */
EXPORT int fakecuda_set(const char *name, double value) {
    if (!strcmp(name, "ns_per_byte"))
        ns_per_byte = value;
    else if (!strcmp(name, "kernel_us"))
        kernel_us = value;
    else if (!strcmp(name, "memory_mb"))
        memory = (size_t)(value * (1 << 20));
    else if (!strcmp(name, "graph_bytes"))
        graph_bytes = value;
    else if (!strcmp(name, "switch_fails"))
        switch_fails = value != 0;
    else if (!strcmp(name, "hosts")) {
        pthread_mutex_lock(&lock);
        set_hosts((int)value);
        pthread_mutex_unlock(&lock);
    } else
        return -1;
    return 0;
}

__attribute__((destructor)) static void write_counts(void) {
    const char *path = getenv("FAKECUDA_STATS"), *comma = "";
    FILE *file = path && *path ? fopen(path, "w") : NULL;
    if (!file)
        return;
    fputc('{', file);
#define WRITE(each)                                                                                \
    fprintf(file, "%s\"%s\": %lld", comma, #each, counts.each);                                    \
    comma = ", ";
    COUNTS(WRITE)
    fputs("}\n", file);
    fclose(file);
}

/* --- the driver: devices --------------------------------------------------------------------- */

static void read_settings(void) {
    int real = (int)setting("FAKECUDA_DEVICES", 1);
    const char *shown = getenv("CUDA_VISIBLE_DEVICES");
    memory = (size_t)(setting("FAKECUDA_MEMORY_MB", 8192) * (1 << 20));
    ns_per_byte = setting("FAKECUDA_NS_PER_BYTE", 0);
    kernel_us = setting("FAKECUDA_KERNEL_US", 0);
    fail_call = (long long)setting("FAKECUDA_FAIL_CALL", 0);
    switch_fails = setting("FAKECUDA_SWITCH_FAILS", switch_fails) != 0;
    fail_kernel = (long long)setting("FAKECUDA_FAIL_KERNEL", 0);
    fail_code = (int)setting("FAKECUDA_FAIL_CODE", 700);
    device_count = 0;
    if (!shown)
        for (; device_count < real && device_count < MAX_DEVICES; device_count++)
            visible[device_count] = device_count;
    while (shown && *shown && device_count < MAX_DEVICES) {
        char *end;
        long number = strtol(shown, &end, 10);
        if (end == shown || number < 0 || number >= real)
            break; /* As the driver: what follows a bad one is not seen either. */
        visible[device_count++] = (int)number;
        shown = *end == ',' ? end + 1 : end;
    }
    for (int n = 0; n < device_count; n++)
        devices[n].primary.device = n;
}

CUresult CUDAAPI cuInit(unsigned int flags) {
    pthread_mutex_lock(&lock);
    if (!initialised)
        read_settings();
    initialised = device_count > 0;
    return leave(flags ? CUDA_ERROR_INVALID_VALUE : initialised ? CUDA_SUCCESS
                                                                : CUDA_ERROR_NO_DEVICE);
}

CUresult CUDAAPI cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }

static const struct {
    int code;
    const char *name, *text;
} errors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {710, "CUDA_ERROR_ASSERT", "device-side assert triggered"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
};

CUresult CUDAAPI cuGetErrorString(CUresult error, const char **text) {
    *text = "unknown error";
    for (size_t n = 0; n < sizeof errors / sizeof *errors; n++)
        if (errors[n].code == (int)error)
            *text = errors[n].text;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetErrorName(CUresult error, const char **name) {
    *name = "CUDA_ERROR_UNKNOWN";
    for (size_t n = 0; n < sizeof errors / sizeof *errors; n++)
        if (errors[n].code == (int)error)
            *name = errors[n].name;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetCount(int *count) {
    ENTER(0);
    return *count = device_count, CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(0);
    if (ordinal < 0 || ordinal >= device_count)
        return CUDA_ERROR_INVALID_DEVICE;
    return *device = ordinal, CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetName(char *name, int size, CUdevice device) {
    ENTER(0);
    snprintf(name, size, "fake CUDA device %d", visible[device]);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    ENTER(0);
    memset(uuid, 0xFA, sizeof *uuid);
    uuid->bytes[15] = (char)visible[device];
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetPCIBusId(char *id, int size, CUdevice device) {
    ENTER(0);
    snprintf(id, size, "0000:%02X:00.0", visible[device] + 1);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
    ENTER(0);
    *major = 9, *minor = 0;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    ENTER(0);
    return *bytes = memory, CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTER(0);
    switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *value = 2; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_MODE: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_INTEGRATED: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *value = visible[device] + 1; break;
    case CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID:
    case CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID: *value = 0; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags,
                                  CUdriverProcAddressQueryResult *status) {
    static const char *const suffixes[] = {"_v4", "_v3", "_v2", ""};
    Dl_info self;
    char name[256];
    *function = NULL;
    if (!dladdr((void *)&fakecuda_count, &self))
        return CUDA_ERROR_UNKNOWN;
    void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    for (size_t n = 0; library && !*function && n < sizeof suffixes / sizeof *suffixes; n++) {
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[n]);
        *function = dlsym(library, name);
    }
    if (library)
        dlclose(library);
    if (status)
        *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

/* --- the driver: contexts. Those of the stack work on a failed device, too -------------------- */

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER(0);
    if (device < 0 || device >= device_count)
        return CUDA_ERROR_INVALID_DEVICE;
    pthread_mutex_lock(&lock);
    Context *primary = &devices[device].primary;
    if (!primary->retains++) {
        primary->alive = 1;
        counts.contexts++;
    }
    counts.primary_retains++;
    *context = (CUcontext)primary;
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device) {
    pthread_mutex_lock(&lock);
    Context *primary = &devices[device].primary;
    if (!primary->retains)
        return leave(CUDA_ERROR_INVALID_CONTEXT);
    counts.primary_retains--;
    if (!--primary->retains) {
        primary->alive = 0;
        counts.contexts--;
    }
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuDevicePrimaryCtxGetState(CUdevice device, unsigned int *flags, int *active) {
    ENTER(0);
    *flags = devices[device].primary.flags;
    *active = devices[device].primary.alive;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxSetFlags(CUdevice device, unsigned int flags) {
    ENTER(0);
    devices[device].primary.flags = flags;
    return CUDA_SUCCESS;
}

static void push(Context *context) {
    if (depth == room) {
        room = room ? 2 * room : 16;
        stack = realloc(stack, room * sizeof *stack);
    }
    stack[depth++] = context;
}

CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) {
    if (switch_fails && sticky)
        return sticky;
    if (!context || !((Context *)context)->alive)
        return CUDA_ERROR_INVALID_CONTEXT;
    push((Context *)context);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxPopCurrent(CUcontext *context) {
    if (!depth)
        return CUDA_ERROR_INVALID_CONTEXT;
    depth--;
    if (context)
        *context = (CUcontext)stack[depth];
    if (!depth) {
        free(stack);
        stack = NULL;
        room = 0;
    }
    return switch_fails ? sticky : CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext *context) {
    return *context = (CUcontext)current(), CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
    if (depth)
        depth--;
    if (context)
        push((Context *)context);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxCreate(CUcontext *context, CUctxCreateParams *parameters, unsigned int flags,
                             CUdevice device) {
    ENTER(0);
    if (device < 0 || device >= device_count)
        return CUDA_ERROR_INVALID_DEVICE;
    Context *made = calloc(1, sizeof *made); /* never freed: a stack may still name it */
    *made = (Context){1, device, 0, flags};
    pthread_mutex_lock(&lock);
    counts.contexts++;
    pthread_mutex_unlock(&lock);
    *context = (CUcontext)made;
    return cuCtxPushCurrent(*context);
}

CUresult CUDAAPI cuCtxDestroy(CUcontext context) {
    Context *gone = (Context *)context;
    pthread_mutex_lock(&lock);
    if (!gone || !gone->alive)
        return leave(CUDA_ERROR_INVALID_CONTEXT);
    gone->alive = 0;
    counts.contexts--;
    if (current() == gone)
        depth--;
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuCtxDetach(CUcontext context) { return cuCtxDestroy(context); }

CUresult CUDAAPI cuCtxGetDevice(CUdevice *device) {
    ENTER(1);
    return *device = current()->device, CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetFlags(unsigned int *flags) {
    ENTER(1);
    return *flags = current()->flags, CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetApiVersion(CUcontext context, unsigned int *version) {
    ENTER(0);
    return *version = CUDA_VERSION, CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSynchronize(void) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    for (Stream *s = streams; s; s = s->next_stream)
        if (s->capture && s->device == current()->device) {
            s->capture_broken = 1;
            return leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
    return leave(drain_device(current()->device, 0));
}

/* --- the driver: memory ---------------------------------------------------------------------- */

CUresult CUDAAPI cuMemGetInfo(size_t *left, size_t *total) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    size_t used = devices[current()->device].used;
    *left = used < memory ? memory - used : 0;
    *total = memory;
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemAlloc(CUdeviceptr *pointer, size_t size) {
    ENTER(1);
    return allocate((void **)pointer, size, current()->device);
}

CUresult CUDAAPI cuMemFree(CUdeviceptr pointer) {
    ENTER(1);
    return pointer ? release((void *)pointer, 0, 0) : CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemHostAlloc(void **pointer, size_t size, unsigned int flags) {
    ENTER(1);
    return allocate(pointer, size, -1);
}

CUresult CUDAAPI cuMemAllocHost(void **pointer, size_t size) {
    ENTER(1);
    return allocate(pointer, size, -1);
}

CUresult CUDAAPI cuMemFreeHost(void *pointer) {
    ENTER(1);
    return release(pointer, 1, 0);
}

CUresult CUDAAPI cuMemHostRegister(void *pointer, size_t size, unsigned int flags) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Block *b = calloc(1, sizeof *b);
    *b = (Block){blocks, pointer, size, -1, 1};
    blocks = b;
    counts.pinned_allocations++;
    counts.pinned_bytes += size;
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemHostUnregister(void *pointer) {
    ENTER(1);
    return release(pointer, 1, 1);
}

CUresult CUDAAPI cuMemHostGetDevicePointer(CUdeviceptr *mapped, void *pointer, unsigned int flags) {
    ENTER(1);
    return *mapped = (CUdeviceptr)pointer, CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemHostGetFlags(unsigned int *flags, void *pointer) {
    ENTER(1);
    return *flags = 0, CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemGetAddressRange(CUdeviceptr *base, size_t *size, CUdeviceptr pointer) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Block *b = holder((void *)pointer, 1);
    if (b && base)
        *base = (CUdeviceptr)b->start;
    if (b && size)
        *size = b->size;
    return leave(b ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

CUresult CUDAAPI cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t size) {
    ENTER(1);
    return copy((void *)to, from, size, H2D, NULL, 1);
}

CUresult CUDAAPI cuMemcpyDtoH(void *to, CUdeviceptr from, size_t size) {
    ENTER(1);
    return copy(to, (void *)from, size, D2H, NULL, 1);
}

CUresult CUDAAPI cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t size) {
    ENTER(1);
    return copy((void *)to, (void *)from, size, COMPUTE, NULL, 1);
}

CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    ENTER(1);
    return copy((void *)to, from, size, H2D, stream, 0);
}

CUresult CUDAAPI cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    ENTER(1);
    return copy(to, (void *)from, size, D2H, stream, 0);
}

CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    ENTER(1);
    return copy((void *)to, (void *)from, size, COMPUTE, stream, 0);
}

CUresult CUDAAPI cuMemsetD8(CUdeviceptr to, unsigned char value, size_t size) {
    ENTER(1);
    return set(to, value, 1, size, NULL, 1);
}

CUresult CUDAAPI cuMemsetD32(CUdeviceptr to, unsigned int value, size_t size) {
    ENTER(1);
    return set(to, value, 4, size, NULL, 1);
}

CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream stream) {
    ENTER(1);
    return set(to, value, 1, size, stream, 0);
}

CUresult CUDAAPI cuMemsetD32Async(CUdeviceptr to, unsigned int value, size_t size, CUstream stream) {
    ENTER(1);
    return set(to, value, 4, size, stream, 0);
}

/* --- the driver: streams and events ----------------------------------------------------------- */

CUresult CUDAAPI cuStreamCreate(CUstream *stream, unsigned int flags) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Stream *s = open_stream(current()->device, flags);
    if (!s)
        return leave(CUDA_ERROR_OUT_OF_MEMORY);
    counts.streams++;
    *stream = (CUstream)s;
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuStreamCreateWithPriority(CUstream *stream, unsigned int flags, int priority) {
    return cuStreamCreate(stream, flags);
}

CUresult CUDAAPI cuStreamGetFlags(CUstream stream, unsigned int *flags) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Stream *s = find_stream(stream);
    if (s)
        *flags = s->flags;
    return leave(s ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE);
}

/* What is queued still runs. */
CUresult CUDAAPI cuStreamDestroy(CUstream stream) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Stream *s = is_null(stream) ? NULL : find_stream(stream);
    if (!s)
        return leave(CUDA_ERROR_INVALID_HANDLE);
    s->closing = 1;
    counts.streams--;
    pthread_cond_broadcast(&s->wake);
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuStreamSynchronize(CUstream stream) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Stream *s = find_stream(stream);
    if (!s)
        return leave(CUDA_ERROR_INVALID_HANDLE);
    if (s->capture) {
        s->capture_broken = 1;
        return leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    for (Stream *t = is_null(stream) ? streams : NULL; t; t = t->next_stream)
        if (t->capture && t->device == s->device && !(t->flags & CU_STREAM_NON_BLOCKING)) {
            t->capture_broken = 1;
            return leave(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        }
    return leave(is_null(stream) ? drain_device(s->device, 1) : drain(s));
}

CUresult CUDAAPI cuStreamQuery(CUstream stream) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Stream *s = find_stream(stream);
    if (!s)
        return leave(CUDA_ERROR_INVALID_HANDLE);
    if (s->capture) {
        s->capture_broken = 1;
        return leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    return leave(s->head ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

CUresult CUDAAPI cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data) {
    ENTER(1);
    Op op = {.kind = HOST, .engine = -1, .host = function, .arg = data};
    return submit(stream, &op, 0);
}

CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned int flags) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Event *e = calloc(1, sizeof *e);
    e->flags = flags;
    e->next_event = events;
    events = e;
    counts.events++;
    *event = (CUevent)e;
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuEventDestroy(CUevent event) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Event *e = find_event(event);
    if (!e)
        return leave(CUDA_ERROR_INVALID_HANDLE);
    counts.events--;
    e->dead = 1;
    put_event(e);
    return leave(CUDA_SUCCESS);
}

static CUresult with_event(CUevent event, CUstream stream, enum Kind kind, int external) {
    Op op = {.kind = kind, .engine = -1, .event = (Event *)event, .external = external};
    return event ? submit(stream, &op, 0) : CUDA_ERROR_INVALID_HANDLE;
}

CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
    ENTER(1);
    return with_event(event, stream, RECORD, 0);
}

CUresult CUDAAPI cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned int flags) {
    ENTER(1);
    return with_event(event, stream, RECORD, flags & CU_EVENT_RECORD_EXTERNAL);
}

CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
    ENTER(1);
    return with_event(event, stream, WAIT, flags & CU_EVENT_WAIT_EXTERNAL);
}

CUresult CUDAAPI cuEventQuery(CUevent event) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Event *e = find_event(event);
    if (!e)
        return leave(CUDA_ERROR_INVALID_HANDLE);
    if (breaks_capture())
        return leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    return leave(e->done < e->recorded ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

CUresult CUDAAPI cuEventSynchronize(CUevent event) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Event *e = find_event(event);
    if (!e)
        return leave(CUDA_ERROR_INVALID_HANDLE);
    uint64_t target = e->recorded;
    if (e->flags & CU_EVENT_BLOCKING_SYNC)
        counts.blocking_waits++;
    else
        counts.spinning_waits++;
    Waiter self = {waiters, e, target};
    waiters = &self;
    e->users++;
    while (e->done < target && !sticky) {
        go_on();
        if (e->done < target)
            pthread_cond_wait(&changed, &lock);
    }
    for (Waiter **at = &waiters; *at; at = &(*at)->next_waiter)
        if (*at == &self) {
            *at = self.next_waiter;
            break;
        }
    e->users--;
    put_event(e);
    return leave(sticky);
}

CUresult CUDAAPI cuEventElapsedTime(float *milliseconds, CUevent begin, CUevent end) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Event *b = find_event(begin), *e = find_event(end);
    if (!b || !e || !b->recorded || !e->recorded ||
        ((b->flags | e->flags) & CU_EVENT_DISABLE_TIMING))
        return leave(CUDA_ERROR_INVALID_HANDLE);
    if (b->done < b->recorded || e->done < e->recorded)
        return leave(CUDA_ERROR_NOT_READY);
    *milliseconds = (float)((e->at - b->at) * 1e3);
    return leave(CUDA_SUCCESS);
}

/* --- the driver: graphs of one stream ---------------------------------------------------------- */

static Graph *new_graph(int is_exec) {
    Graph *g = calloc(1, sizeof *g);
    g->is_exec = is_exec;
    g->next_graph = graphs;
    graphs = g;
    return g;
}

static Graph *find_graph(void *h, int is_exec) {
    for (Graph *g = graphs; g; g = g->next_graph)
        if (g == h && g->is_exec == is_exec)
            return g;
    return NULL;
}

static void free_graph(Graph *g) {
    for (Graph **at = &graphs; *at; at = &(*at)->next_graph)
        if (*at == g) {
            *at = g->next_graph;
            break;
        }
    for (Op *op = g->first, *next; op; op = next) {
        next = op->next;
        free(op);
    }
    free(g);
}

CUresult CUDAAPI cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Stream *s = find_stream(stream);
    if (!s)
        return leave(CUDA_ERROR_INVALID_HANDLE);
    if (is_null(stream) || s->capture)
        return leave(is_null(stream) ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
                                     : CUDA_ERROR_ILLEGAL_STATE);
    s->capture = new_graph(0);
    s->mode = mode;
    s->capturer = pthread_self();
    s->capture_broken = 0;
    counts.graphs++;
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Stream *s = find_stream(stream);
    *graph = NULL;
    if (!s || !s->capture)
        return leave(s ? CUDA_ERROR_ILLEGAL_STATE : CUDA_ERROR_INVALID_HANDLE);
    Graph *captured = s->capture;
    s->capture = NULL;
    if (s->capture_broken) {
        counts.graphs--;
        free_graph(captured);
        return leave(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    }
    *graph = (CUgraph)captured;
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Stream *s = find_stream(stream);
    if (s)
        *status = !s->capture ? CU_STREAM_CAPTURE_STATUS_NONE
                  : s->capture_broken ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                      : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return leave(s ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE);
}

CUresult CUDAAPI cuGraphInstantiate(CUgraphExec *exec, CUgraph graph, unsigned long long flags) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Graph *g = find_graph(graph, 0);
    if (!g)
        return leave(CUDA_ERROR_INVALID_VALUE);
    Graph *made = new_graph(1);
    for (Op *op = g->first; op; op = op->next) {
        Op *same = malloc(sizeof *same);
        *same = *op;
        same->next = NULL;
        same->in_graph = 1;
        if (made->last)
            made->last->next = same;
        else
            made->first = same;
        made->last = same;
    }
    counts.graph_execs++;
    *exec = (CUgraphExec)made;
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuGraphLaunch(CUgraphExec exec, CUstream stream) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    Graph *g = find_graph(exec, 1);
    double copied = 0;
    for (Op *op = g ? g->first : NULL; op; op = op->next)
        copied += op->kind == COPY ? op->size : 0;
    int fits = !graph_bytes || copied <= graph_bytes;
    counts.graph_launches += g && fits;
    pthread_mutex_unlock(&lock);
    if (!g || !fits)
        return g ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_INVALID_VALUE;
    for (Op *op = g->first; op; op = op->next) {
        CUresult answer = submit(stream, op, 0);
        if (answer)
            return answer;
    }
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGraphUpload(CUgraphExec exec, CUstream stream) {
    ENTER(1);
    pthread_mutex_lock(&lock);
    int found = find_graph(exec, 1) != NULL;
    counts.graph_uploads += found;
    return leave(found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec exec) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    Graph *g = find_graph(exec, 1);
    if (!g)
        return leave(CUDA_ERROR_INVALID_VALUE);
    counts.graph_execs--;
    free_graph(g);
    return leave(CUDA_SUCCESS);
}

CUresult CUDAAPI cuGraphDestroy(CUgraph graph) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    Graph *g = find_graph(graph, 0);
    if (!g)
        return leave(CUDA_ERROR_INVALID_VALUE);
    counts.graphs--;
    free_graph(g);
    return leave(CUDA_SUCCESS);
}
