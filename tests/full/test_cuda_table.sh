#!/bin/sh
# The cross product of formats and shapes on the CUDA kernels, through the mock driver.
exec "${BUILD:-build}/tests/backend/test_cuda" full
