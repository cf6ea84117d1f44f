/* The wrapped Vulkan loader itself: what is right passes, each kind of mistake is noticed, what is made to fail does. */
#include "../common/vk_wrap.h"

#include <vulkan/vulkan_core.h>
static PFN_vkVoidFunction wrapped_loader(VkInstance instance, const char *name);
#define VKR_LOADER wrapped_loader
#include "../vulkan/vk_run.h"

static PFN_vkVoidFunction wrapped_loader(VkInstance instance, const char *name) {
    void *p = vkw_get_instance_proc_addr(instance, name);
    PFN_vkVoidFunction f;
    memcpy(&f, &p, sizeof f);
    return f;
}

static char text[1200];

/* 64 bytes copied from one buffer to another by copy.comp. */
typedef struct fixture {
    vkr r;
    vkr_pipeline p;
    vkr_bindings b;
    kvli_vk_push push;
} fixture;
static fixture f;

static void open_all(void) {
    uint32_t spec[KVLI_VK_SPECIALISATIONS] = {8, 2, 2, 2, 2, 0, 64, 32, 4, 4};
    const uint32_t copy[6] = {0, 0, 0, 1, 64, 0};
    memset(&f, 0, sizeof f);
    assert_true(vkr_open(&f.r, 256, true));
    f.p = vkr_pipeline_make(&f.r, "copy", 0, spec);
    f.b.pages[0] = vkr_buffer_make(&f.r, 64, NULL);
    f.b.pages[1] = vkr_buffer_make(&f.r, 64, NULL);
    f.b.tables = vkr_buffer_make(&f.r, sizeof copy, copy);
    memset(f.b.pages[1].map, 7, 64);
    f.push.n = 1;
}
static int begin(void **state) {
    (void)state;
    vkw_reset();
    return 0;
}

static void test_right(void **state) {
    (void)state;
    open_all();
    vkr_dispatch(&f.r, &f.p, &f.b, &f.push, 1, 1, 1);
    assert_memory_equal(f.b.pages[0].map, f.b.pages[1].map, 64);
    assert_true(vkw_memory() >= 3 * 64 && vkw_objects() > 8);
    assert_int_equal(vkw_count("vkQueueSubmit"), 1);
    assert_true(vkw_calls(VKW_FAILS) > 20 && vkw_calls(VKW_LOST) == 2);
    vkr_close(&f.r);
    assert_int_equal(vkw_problems(text, sizeof text), 0);
    assert_int_equal(vkw_memory() + vkw_objects(), 0);
}

static void assert_problem(const char *says) {
    int n = vkw_problems(text, sizeof text);
    if (!n || !strstr(text, says)) fail_msg("%d problems, not of \"%s\": %s", n, says, text);
}

static void test_leak(void **state) {
    (void)state;
    open_all();
    f.r.vkDestroyDevice(f.r.device, NULL);
    f.r.vkDestroyInstance(f.r.instance, NULL);
    assert_problem("has not been destroyed"); /* the validation layer */
    assert_true(vkw_memory() > 0);
    vkw_reset();
    vkw()->quiet = true;
    open_all();
    f.r.vkDestroyDevice(f.r.device, NULL);
    f.r.vkDestroyInstance(f.r.instance, NULL);
    assert_problem("is left");
}

static void test_hazard(void **state) {
    const VkPipelineStageFlags stage = VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT;
    const VkMemoryBarrier barrier = {.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
                                     .srcAccessMask = VK_ACCESS_SHADER_WRITE_BIT,
                                     .dstAccessMask = VK_ACCESS_SHADER_READ_BIT};
    VkCommandBufferBeginInfo info = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO};
    (void)state;
    open_all();
    vkr_bind(&f.r, &f.p, &f.b);
    f.r.vkBeginCommandBuffer(f.r.commands, &info);
    f.r.vkCmdBindPipeline(f.r.commands, VK_PIPELINE_BIND_POINT_COMPUTE, f.p.pipeline);
    f.r.vkCmdBindDescriptorSets(f.r.commands, VK_PIPELINE_BIND_POINT_COMPUTE, f.p.layout, 0, 2, f.p.set, 0,
                                NULL);
    f.r.vkCmdPushConstants(f.r.commands, f.p.layout, VK_SHADER_STAGE_COMPUTE_BIT, 0, sizeof f.push, &f.push);
    f.r.vkCmdDispatch(f.r.commands, 1, 1, 1);
    f.r.vkCmdPipelineBarrier(f.r.commands, stage, stage, 0, 1, &barrier, 0, NULL, 0, NULL);
    f.r.vkCmdDispatch(f.r.commands, 1, 1, 1);
    assert_int_equal(vkw_wrong(), 0);
    f.r.vkCmdDispatch(f.r.commands, 1, 1, 1); /* writes what the one before reads */
    assert_int_equal(vkw_wrong(), 2);
    f.r.vkEndCommandBuffer(f.r.commands);
    assert_problem("without a barrier");
    vkr_close(&f.r);
}

static void test_lock(void **state) {
    (void)state;
    vkw()->lock = true;
    open_all();
    vkw_lock(NULL);
    vkr_dispatch(&f.r, &f.p, &f.b, &f.push, 1, 1, 1);
    vkw_unlock(NULL);
    vkr_dispatch(&f.r, &f.p, &f.b, &f.push, 1, 1, 1);
    vkr_close(&f.r);
    assert_problem("not locked");
}

static void test_failing(void **state) {
    VkFenceCreateInfo info = {.sType = VK_STRUCTURE_TYPE_FENCE_CREATE_INFO};
    VkSubmitInfo submit = {.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO};
    VkFence fence;
    (void)state;
    open_all();
    vkw_fail(2, VKW_FAILS);
    assert_int_equal(f.r.vkCreateFence(f.r.device, &info, NULL, &fence), VK_SUCCESS);
    assert_true(f.r.vkResetFences(f.r.device, 1, &fence) < 0);
    assert_string_equal(vkw_failed(), "vkResetFences");
    assert_int_equal(f.r.vkResetFences(f.r.device, 1, &fence), VK_SUCCESS);
    f.r.vkDestroyFence(f.r.device, fence, NULL);
    vkw_fail(2, VKW_LOST);
    assert_int_equal(f.r.vkResetFences(f.r.device, 1, &f.r.fence), VK_SUCCESS); /* does not count */
    assert_int_equal(f.r.vkQueueSubmit(f.r.queue, 1, &submit, f.r.fence), VK_SUCCESS);
    assert_int_equal(f.r.vkWaitForFences(f.r.device, 1, &f.r.fence, 1, UINT64_MAX), VK_ERROR_DEVICE_LOST);
    assert_int_equal(f.r.vkQueueSubmit(f.r.queue, 1, &submit, f.r.fence), VK_ERROR_DEVICE_LOST);
    assert_int_equal(vkw_failures(), 1);
    vkr_close(&f.r);
    assert_int_equal(vkw_problems(text, sizeof text), 0);
    open_all(); /* a new device works */
    vkr_dispatch(&f.r, &f.p, &f.b, &f.push, 1, 1, 1);
    vkr_close(&f.r);
}

static void test_broken(void **state) {
    size_t words;
    uint32_t *code = vkr_shader("copy", 0, &words), right = 0;
    (void)state;
    vkw()->broken[0].words = code;
    vkw()->broken[0].n_words = words;
    vkw()->n_broken = 1;
    for (vkw()->how = 0; vkw()->how < 9; vkw()->how++) {
        open_all();
        vkr_dispatch(&f.r, &f.p, &f.b, &f.push, 1, 1, 1);
        right += !memcmp(f.b.pages[0].map, f.b.pages[1].map, 64);
        assert_true(vkw()->how || !right);
        vkr_close(&f.r);
    }
    assert_true(vkw_broken() == 9 && right < 8);
    assert_int_equal(vkw_problems(text, sizeof text), 0);
    free(code);
}

static void test_shown(void **state) {
    VkPhysicalDeviceMemoryBudgetPropertiesEXT budget = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT};
    VkPhysicalDeviceMemoryProperties2 memory = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2, .pNext = &budget};
    VkMemoryAllocateInfo info = {.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO, .allocationSize = 3 << 20};
    PFN_vkGetPhysicalDeviceMemoryProperties2 get;
    VkDeviceMemory at;
    void *map;
    (void)state;
    open_all();
    vkw()->discrete = vkw()->budget = true;
    vkw()->heap_bytes = 6 << 20;
    vkw()->heap_budget = 5 << 20;
    vkw()->others_use = 1 << 20;
    get = (PFN_vkGetPhysicalDeviceMemoryProperties2)wrapped_loader(f.r.instance,
                                                                   "vkGetPhysicalDeviceMemoryProperties2");
    assert_int_equal(f.r.vkAllocateMemory(f.r.device, &info, NULL, &at), VK_SUCCESS);
    get(f.r.physical, &memory);
    assert_int_equal(memory.memoryProperties.memoryTypeCount, 2);
    assert_int_equal(memory.memoryProperties.memoryHeaps[0].size, 6 << 20);
    assert_int_equal(budget.heapBudget[0], 5 << 20);
    assert_true(budget.heapUsage[0] >= 4 << 20 && budget.heapUsage[0] < 5 << 20);
    assert_int_equal(f.r.vkMapMemory(f.r.device, at, 0, VK_WHOLE_SIZE, 0, &map), VK_SUCCESS);
    assert_problem("does not see");
    f.r.vkFreeMemory(f.r.device, at, NULL);
    info.allocationSize = 7 << 20;
    assert_int_equal(f.r.vkAllocateMemory(f.r.device, &info, NULL, &at), VK_ERROR_OUT_OF_DEVICE_MEMORY);
    vkr_close(&f.r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_right, begin),   cmocka_unit_test_setup(test_leak, begin),
        cmocka_unit_test_setup(test_hazard, begin),  cmocka_unit_test_setup(test_lock, begin),
        cmocka_unit_test_setup(test_failing, begin), cmocka_unit_test_setup(test_broken, begin),
        cmocka_unit_test_setup(test_shown, begin),
    };
#if defined(__SANITIZE_THREAD__)
    printf("SKIP lavapipe's threads are not ThreadSanitizer's\n");
    return 77;
#endif
    if (!vkw_open(256)) return 77;
    return cmocka_run_group_tests_name("the wrapped Vulkan loader", tests, NULL, NULL);
}
