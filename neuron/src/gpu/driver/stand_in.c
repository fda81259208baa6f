/* A CUDA driver, cuBLAS and NCCL for tests on hosts that have none: memory is the host's, and a stream does nothing until
 * somebody waits for it, so that whoever does not wait where he must is found out. One source makes all libraries. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NO_DEVICE = 101, BAD_HANDLE = 400, CAPTURED = 900, NOT_CAPTURED = 901 };
enum kind { COPY, FILL, KERNEL, PRODUCT };

struct work {
  enum kind kind;
  void *to;
  const void *from, *other;
  size_t bytes;
  float factor;
  int count, m, n, k, type;
  struct work *next;
};
struct list {
  struct work *first, **end;
  size_t done, asked;
};
struct stream {
  struct list list;
  struct list *recorded;
};
struct event {
  struct stream *stream;
  size_t asked;
};
struct blas {
  struct stream *stream;
  size_t workspace;
};

static struct list *list_of(struct list *list) {
  list->first = NULL;
  list->end = &list->first;
  return list;
}

static void add(struct list *list, struct work work) {
  struct work *copy = malloc(sizeof work);
  *copy = work;
  copy->next = NULL;
  *list->end = copy;
  list->end = &copy->next;
  list->asked++;
}

static void ask(struct stream *stream, struct work work) {
  add(stream->recorded ? stream->recorded : &stream->list, work);
}

static float number(const void *from, int type, size_t at) {
  if (type == 0) return ((const float *)from)[at];
  uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

static void execute(const struct work *work) {
  switch (work->kind) {
    case COPY:
      memmove(work->to, work->from, work->bytes);
      break;
    case FILL:
      memset(work->to, 0, work->bytes);
      break;
    case KERNEL:
      for (int i = 0; i < work->count; i++) ((float *)work->to)[i] += work->factor * ((const float *)work->from)[i];
      break;
    case PRODUCT: /* column by column: to(m, n) = fromᵀ(m, k) · other(k, n) */
      for (int row = 0; row < work->m; row++)
        for (int column = 0; column < work->n; column++) {
          float sum = 0;
          for (int i = 0; i < work->k; i++)
            sum += number(work->from, work->type, (size_t)row * work->k + i) *
                   number(work->other, work->type, (size_t)column * work->k + i);
          ((float *)work->to)[(size_t)column * work->m + row] = sum;
        }
      break;
  }
}

static void go_to(struct stream *stream, size_t asked) {
  struct list *list = &stream->list;
  while (list->done < asked) {
    struct work *work = list->first;
    execute(work);
    list->first = work->next;
    if (!list->first) list->end = &list->first;
    free(work);
    list->done++;
  }
}

/* The driver. */
int cuInit(unsigned flags) { return flags ? INVALID : OK; }
int cuDriverGetVersion(int *version) {
  const char *wanted = getenv("STAND_IN_VERSION");
  *version = wanted ? atoi(wanted) : 13000;
  return OK;
}
int cuDeviceGetCount(int *count) { return *count = 2, OK; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal < 2 ? OK : NO_DEVICE; }
int cuDeviceGetName(char *name, int length, int device) {
  (void)device;
  strncpy(name, "stand-in", (size_t)length);
  return OK;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)attribute, (void)device;
  return *value = 2, OK;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return (void)device, *bytes = 1 << 30, OK; }
int cuDeviceGetUuid_v2(char *uuid, int device) {
  for (int i = 0; i < 16; i++) uuid[i] = (char)(i * 17);
  return (void)device, OK;
}
static int context, active;
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is) { return (void)device, *flags = 0, *is = active > 0, OK; }
int cuDevicePrimaryCtxRetain(void **handle, int device) { return (void)device, active++, *handle = &context, OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, active--, OK; }
static __thread void *current;
int cuCtxSetCurrent(void *handle) { return current = handle, OK; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
  return *free = 1 << 29, *total = 1 << 30, current ? OK : 201;
}
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  if (!current) return 201;
  if (bytes > 1 << 30) return NO_MEMORY;
  *address = (uint64_t)(uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
  return OK;
}
int cuMemFree_v2(uint64_t address) { return free((void *)(uintptr_t)address), OK; }
int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) { return (void)flags, *memory = malloc(bytes), OK; }
int cuMemFreeHost(void *memory) { return free(memory), OK; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, struct stream *stream) {
  return ask(stream, (struct work){.kind = COPY, .to = (void *)(uintptr_t)to, .from = from, .bytes = bytes}), OK;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, struct stream *stream) {
  return ask(stream, (struct work){.kind = COPY, .to = to, .from = (void *)(uintptr_t)from, .bytes = bytes}), OK;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, struct stream *stream) {
  return cuMemcpyHtoDAsync_v2(to, (void *)(uintptr_t)from, bytes, stream);
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, struct stream *stream) {
  if (value) return INVALID;
  return ask(stream, (struct work){.kind = FILL, .to = (void *)(uintptr_t)to, .bytes = bytes}), OK;
}
int cuStreamCreate(struct stream **stream, unsigned flags) {
  (void)flags;
  *stream = calloc(1, sizeof **stream);
  list_of(&(*stream)->list);
  return OK;
}
int cuStreamDestroy_v2(struct stream *stream) { return free(stream), OK; }
int cuStreamSynchronize(struct stream *stream) {
  if (stream->recorded) return CAPTURED;
  return go_to(stream, stream->list.asked), OK;
}
int cuStreamQuery(struct stream *stream) { return cuStreamSynchronize(stream); }
int cuStreamBeginCapture_v2(struct stream *stream, int mode) {
  if (stream->recorded || mode != 1) return INVALID;
  stream->recorded = list_of(calloc(1, sizeof(struct list)));
  return OK;
}
int cuStreamEndCapture(struct stream *stream, struct list **graph) {
  *graph = stream->recorded;
  stream->recorded = NULL;
  return *graph ? OK : NOT_CAPTURED;
}
int cuGraphInstantiateWithFlags(struct list **ready, struct list *graph, unsigned long long flags) {
  (void)flags;
  *ready = list_of(calloc(1, sizeof **ready));
  for (struct work *work = graph->first; work; work = work->next) add(*ready, *work);
  return OK;
}
static int drop(struct list *list) {
  while (list->first) {
    struct work *work = list->first;
    list->first = work->next;
    free(work);
  }
  return free(list), OK;
}
int cuGraphDestroy(struct list *graph) { return drop(graph); }
int cuGraphExecDestroy(struct list *ready) { return drop(ready); }
int cuGraphLaunch(struct list *ready, struct stream *stream) {
  for (struct work *work = ready->first; work; work = work->next) ask(stream, *work);
  return OK;
}
int cuEventCreate(struct event **event, unsigned flags) {
  return (void)flags, *event = calloc(1, sizeof **event), OK;
}
int cuEventRecord(struct event *event, struct stream *stream) {
  *event = (struct event){stream, stream->list.asked};
  return stream->recorded ? CAPTURED : OK;
}
int cuEventSynchronize(struct event *event) {
  if (event->stream) go_to(event->stream, event->asked);
  return OK;
}
int cuEventDestroy_v2(struct event *event) { return free(event), OK; }

/* Every module has the one kernel of the test. */
static int module, most_shared = 48 << 10;
int cuModuleLoadDataEx(void **handle, const char *text, unsigned count, int *options, void **values) {
  (void)options, (void)values;
  *handle = &module;
  return count == 2 && strlen(text) > 0 ? OK : INVALID;
}
int cuModuleUnload(void *handle) { return handle == &module ? OK : BAD_HANDLE; }
int cuModuleGetFunctionCount(unsigned *count, void *handle) { return (void)handle, *count = 1, OK; }
int cuModuleEnumerateFunctions(void **functions, unsigned count, void *handle) {
  return functions[0] = handle, count == 1 ? OK : INVALID;
}
int cuFuncGetName(const char **name, void *function) { return (void)function, *name = "add_scaled", OK; }
int cuFuncLoad(void *function) { return function == &module ? OK : BAD_HANDLE; }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  return (void)function, *value = most_shared, attribute == 8 ? OK : INVALID;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  return (void)function, most_shared = value, attribute == 8 ? OK : INVALID;
}
int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
  static const size_t sizes[] = {8, 8, 4, 4}, offsets[] = {0, 8, 16, 20};
  (void)function;
  if (index >= 4) return INVALID;
  *offset = offsets[index];
  *size = sizes[index];
  return OK;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, struct stream *stream, void **arguments, void **extra) {
  if (function != &module || extra || y * z * by * bz != 1 || shared > (unsigned)most_shared) return INVALID;
  int count = *(int *)arguments[3];
  if (count > (int)(x * bx)) count = (int)(x * bx);
  struct work work = {.kind = KERNEL, .count = count, .factor = *(float *)arguments[2]};
  work.to = *(void **)arguments[0];
  work.from = *(void **)arguments[1];
  return ask(stream, work), OK;
}

/* cuBLAS. */
int cublasCreate_v2(struct blas **blas) { return *blas = calloc(1, sizeof **blas), OK; }
int cublasDestroy_v2(struct blas *blas) { return free(blas), OK; }
int cublasSetMathMode(struct blas *blas, int mode) { return blas && mode == 16 ? OK : 7; }
int cublasSetStream_v2(struct blas *blas, struct stream *stream) { return *blas = (struct blas){stream, 0}, OK; }
int cublasSetWorkspace_v2(struct blas *blas, void *memory, size_t bytes) {
  return blas->workspace = bytes, memory ? OK : 7;
}
int cublasGemmEx(struct blas *blas, int turn_a, int turn_b, int m, int n, int k, const float *alpha, const void *a, int a_type,
                 int lda, const void *b, int b_type, int ldb, const float *beta, void *c, int c_type, int ldc, int sums,
                 int algorithm) {
  int same = turn_a == 1 && turn_b == 0 && lda == k && ldb == k && ldc == m && a_type == b_type && c_type == 0;
  if (!same || sums != 68 || algorithm != -1 || *alpha != 1 || *beta != 0 || !blas->workspace) return 7;
  struct work work = {.kind = PRODUCT, .to = c, .from = a, .other = b, .m = m, .n = n, .k = k, .type = a_type};
  return ask(blas->stream, work), OK;
}

/* NCCL: two ranks of one group. A call is done when both have come to it. */
enum { FAILED = 3, IN_PROGRESS = 7 };
struct id {
  char bytes[128];
};
struct config {
  size_t size;
  unsigned magic, version;
  int blocking;
};
struct part {
  void *memory;
  size_t count;
  struct stream *stream;
};
struct comm {
  int rank, asked;
};
static pthread_mutex_t meeting = PTHREAD_MUTEX_INITIALIZER;
static struct part parts[2];
static int joined, arrived, done;

int ncclGetUniqueId(struct id *id) {
  memset(id, 1, sizeof *id);
  joined = arrived = done = 0;
  return OK;
}
int ncclCommInitRankConfig(struct comm **comm, int ranks, struct id id, int rank, const struct config *config) {
  if (ranks != 2 || id.bytes[127] != 1 || config->magic != 0xcafebeef || config->blocking) return FAILED;
  *comm = calloc(1, sizeof **comm);
  (*comm)->rank = rank;
  joined++;
  return IN_PROGRESS;
}
int ncclCommGetAsyncError(struct comm *comm, int *state) {
  pthread_mutex_lock(&meeting);
  *state = joined == 2 && done >= comm->asked ? OK : IN_PROGRESS;
  pthread_mutex_unlock(&meeting);
  return OK;
}
int ncclCommAbort(struct comm *comm) { return free(comm), OK; }

static int come(struct comm *comm, struct part part) {
  pthread_mutex_lock(&meeting);
  parts[comm->rank] = part;
  comm->asked++;
  if (++arrived == 2) {
    for (int rank = 0; rank < 2; rank++) go_to(parts[rank].stream, parts[rank].stream->list.asked);
    float *first = parts[0].memory, *second = parts[1].memory;
    for (size_t i = 0; i < part.count; i++)
      first[i] = second[i] = first[i] + second[i];
    arrived = 0;
    done++;
  }
  pthread_mutex_unlock(&meeting);
  return IN_PROGRESS;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, struct comm *comm,
                  struct stream *stream) {
  if (from != to || type != 7 || operation != 0) return FAILED;
  return come(comm, (struct part){to, count, stream});
}
