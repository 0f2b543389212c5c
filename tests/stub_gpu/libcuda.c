/* A CUDA driver that does nothing, for running Triton's real launch path (specialisation, cache, launcher in C) on a
 * machine without a GPU: kernels are compiled, "loaded" and "launched"; a launch only counts. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
static long launches;
long stub_launches(void) { return launches; }
int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int code, const char **text) { *text = "stub driver"; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) { /* an H100's */
    case 8: *value = 49152; break;   /* shared memory a block */
    case 97: *value = 232448; break; /* the same where a kernel asks for more */
    case 16: *value = 132; break;    /* multiprocessors */
    case 82: *value = 65536; break;  /* registers of a multiprocessor */
    case 10: *value = 32; break;     /* threads of a warp */
    default: *value = 1000;
    }
    return 0;
}
/* 1024 threads a block at most; 128 registers a thread (attribute 4); no local memory. */
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 128 : 0;
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)2; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)3; return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { memcpy(data, &pointer, 8); return 0; }
int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) { launches++; return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
int cuTensorMapEncodeTiled(void *map, ...) { memset(map, 0, 128); return 0; }
