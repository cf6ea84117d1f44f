#!/bin/sh
# The cross product of formats and shapes in each variant of the Vulkan backend, on lavapipe.
exec "${BUILD:-build}/tests/backend/test_vulkan" full
