// A libcuda.so.1 that has one card, runs nothing, and prints what it is asked: so that the layer over `cuda-bindings` is
// tested where there is no driver. Loaded by name through LD_LIBRARY_PATH.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {
void* pointer(std::uintptr_t value) { return reinterpret_cast<void*>(value); }
}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return index == 0 ? 0 : 101; }
int cuDeviceGetName(char* name, int length, int) { std::strncpy(name, "Stub", length); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 97 ? 232448 : -1;
    return 0;
}
int cuCtxGetCurrent(void** context) { *context = nullptr; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = pointer(0x1000); return 0; }
int cuCtxSetCurrent(void* context) { std::printf("context %p\n", context); return 0; }
int cuLibraryLoadData(void** library, const char* code, void*, void*, unsigned n_jit, void*, void*, unsigned n_options) {
    std::printf("load %.3s %u %u\n", code + 1, n_jit, n_options);
    *library = pointer(0x2000);
    return std::strncmp(code + 1, "ELF", 3) == 0 ? 0 : 200;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    std::printf("kernel %p %s\n", library, name);
    *kernel = pointer(0x3000);
    return std::strcmp(name, "missing") == 0 ? 500 : 0;
}
int cuKernelGetParamInfo(void*, std::size_t index, std::size_t* offset, std::size_t* size) {
    *offset = 8 * index;
    *size = index == 0 ? 8 : 4;
    return index < 3 ? 0 : 1;
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
    std::printf("attribute %d %d %p %d\n", attribute, value, kernel, device);
    return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared_bytes, void* stream, void** parameters, void** extra) {
    std::printf("launch %p (%u %u %u) (%u %u %u) %u %p %d: %#llx %d %.1f\n", function, gx, gy, gz, bx, by, bz, shared_bytes,
                stream, extra == nullptr, static_cast<unsigned long long>(*static_cast<std::uint64_t*>(parameters[0])),
                *static_cast<int*>(parameters[1]), *static_cast<float*>(parameters[2]));
    return 0;
}
int cuGetProcAddress_v2(const char* name, void** function, int, std::uint64_t, int* status) {
    void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = self == nullptr ? nullptr : dlsym(self, name);
    if (status != nullptr) *status = *function == nullptr;
    return *function == nullptr ? 500 : 0;
}
int cuGetProcAddress(const char* name, void** function, int version, std::uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}

}  // extern "C"
