// The device guard and the launch check.
#include <stdexcept>
#include <string>

#include "launch.h"

namespace wmengine::cuda {

void check(cudaError_t status, const char* operation) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(operation) + " failed on the GPU: " + cudaGetErrorString(status));
    }
}

DeviceGuard::DeviceGuard(int device, const char* operation) {
    check(cudaGetDevice(&previous_), operation);
    if (previous_ != device) {
        check(cudaSetDevice(device), operation);
        changed_ = true;
    }
}

DeviceGuard::~DeviceGuard() {
    if (changed_) {
        cudaSetDevice(previous_);
    }
}

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();  // the failure is the answer: do not leave it for the next call
        return 0;
    }
    return count;
}

}  // namespace wmengine::cuda
