// What the CUDA library calls of CUDA's runtime and of torch's CUDA part, where neither is there: notes what would be
// launched, where. A device's stream is its number and one, in thousands.
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct Launch {
  uint32_t grid[3], block[3];
  size_t shared;
  void* stream;
};

static int current_, fails_, capturing_, launches_, memsets_, guards_, device_ = -1;
static void *stream_, *kernels_[4096];

void set_current(int device) { current_ = device; }
void set_fails(int fails) { fails_ = fails; }
void set_capturing(int capturing) { capturing_ = capturing; }
int current(void) { return current_; }
int launches(void) { return launches_; }
int memsets(void) { return memsets_; }
int guards(void) { return guards_; }
int device_of_launch(void) { return device_; }
uintptr_t stream_of_launch(void) { return (uintptr_t)stream_; }

// --- torch ---

int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = (void*)(uintptr_t)((device + 1) * 1000);
  return 0;
}

int aoti_torch_create_device_guard(int32_t device, void** guard) {
  int* before = malloc(sizeof(int));
  *before = current_;
  current_ = device;
  *guard = before;
  ++guards_;
  return 0;
}

int aoti_torch_delete_device_guard(void* guard) {
  current_ = *(int*)guard;
  free(guard);
  --guards_;
  return 0;
}

int torch_c10_cuda_check_msg(int32_t error, const char* file, const char* function, uint32_t line, bool more,
                             char** text) {
  (void)file, (void)function, (void)line, (void)more;
  *text = error ? strdup("CUDA error: a planted one") : NULL;
  return 0;
}
void torch_c10_cuda_free_error_msg(char* text) { free(text); }

// --- the runtime ---

int cudaGetDevice(int* device) { return *device = current_, 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = attribute == 16 ? 132 : 1;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t shared) {
  (void)kernel, (void)threads, (void)shared;
  return *blocks = 4, 0;
}
int cudaGetLastError(void) { return 0; }
int cudaMalloc(void** memory, size_t bytes) { return *memory = malloc(bytes), 0; }
int cudaMemsetAsync(void* memory, int value, size_t bytes, void* stream) {
  (void)memory, (void)value, (void)bytes, (void)stream;
  ++memsets_;
  return 0;
}
int cudaStreamGetId(void* stream, unsigned long long* id) { return *id = (uintptr_t)stream, 0; }
int cudaStreamIsCapturing(void* stream, int* status) {
  (void)stream;
  *status = capturing_;
  return 0;
}
int cudaThreadExchangeStreamCaptureMode(int* mode) {
  (void)mode;
  return 0;
}

int cudaLaunchKernelExC(const struct Launch* launch, const void* kernel, void** arguments) {
  (void)kernel, (void)arguments;
  if (fails_) return 9;
  device_ = current_;
  stream_ = launch->stream;
  ++launches_;
  return 0;
}
int __cudaLaunchKernel(void) { return 98; }
int __cudaPopCallConfiguration(void) { return 98; }
int __cudaGetKernel(void** kernel, const void* function) { return *kernel = (void*)function, 0; }
void** __cudaRegisterFatBinary(void* binary) {
  (void)binary;
  return kernels_;
}
void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
void __cudaUnregisterFatBinary(void** handle) { (void)handle; }
void __cudaRegisterFunction(void) {}
