#!/bin/sh
# The cross product of formats and shapes in each variant of the Vulkan backend, on lavapipe, and the shaders by themselves
# in all that `make test` leaves out.
build=${BUILD:-build} status=0
for test in backend/test_vulkan vulkan/test_decode vulkan/test_store; do
  "$build/tests/$test" full || status=$?
done
exit $status
