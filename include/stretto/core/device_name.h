// What a device is called by whoever made it.
#ifndef STRETTO_CORE_DEVICE_NAME_H_
#define STRETTO_CORE_DEVICE_NAME_H_

#include <string>

#include "stretto/core/device.h"

namespace stretto {

// "NVIDIA H100 80GB HBM3", or the processor's model.
std::string DeviceName(Device device);

}  // namespace stretto

#endif  // STRETTO_CORE_DEVICE_NAME_H_
