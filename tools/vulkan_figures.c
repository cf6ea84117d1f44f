/* For tools/vulkan_figures.py, which compiles it: pipelines of the shaders in a folder, made on whatever Vulkan device there
 * is, and what its compiler says of each (VK_KHR_pipeline_executable_properties). Mesa's RADV does it without a GPU:
 * RADV_FORCE_FAMILY names the one to compile for.
 *
 * usage: vulkan_figures FOLDER   where SHADER.VARIANT.spv are (tools/shaders.py unpack); pipelines as lines on stdin:
 *                                  SHADER VARIANT PRESET DIM GQA
 *
 * Prints for each pipeline a line "pipeline NAME=VALUE ...", lines "stat NAME: VALUE", and its assembly, "asm " before each line. */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vulkan/vulkan.h>

#include "../kernels_cuda/tables.h"
#include "../kernels_vulkan/abi.h"

typedef struct device {
    VkPhysicalDevice physical;
    VkDevice device;
    VkDescriptorSetLayout sets[2];
    VkPipelineLayout layout;
    uint32_t subgroup, shared, variants;
    char name[VK_MAX_PHYSICAL_DEVICE_NAME_SIZE];
    PFN_vkGetPipelineExecutablePropertiesKHR executables;
    PFN_vkGetPipelineExecutableStatisticsKHR statistics;
    PFN_vkGetPipelineExecutableInternalRepresentationsKHR representations;
} device;

static const struct {
    const char *name;
    uint32_t k, v, exact, rotated;
} presets[] = {
    {"f16", KVLI_GPU_F16, KVLI_GPU_F16, KVLI_GPU_F16, 0},
    {"int8", KVLI_GPU_INT8, KVLI_GPU_INT8, KVLI_GPU_F16, 0},
    {"int8+", KVLI_GPU_INT8_CHANNEL, KVLI_GPU_INT8, KVLI_GPU_F16, 0},
    {"fp8", KVLI_GPU_FP8_E4M3, KVLI_GPU_FP8_E4M3, KVLI_GPU_F16, 0},
    {"balanced", KVLI_GPU_INT8, KVLI_GPU_INT4, KVLI_GPU_F16, 2},
    {"int4", KVLI_GPU_INT4_CHANNEL, KVLI_GPU_INT4, KVLI_GPU_F16, 2},
    {"nvfp4", KVLI_GPU_NVFP4, KVLI_GPU_NVFP4, KVLI_GPU_F16, 1},
};
enum { BANKS = 4, N_PRESETS = sizeof presets / sizeof *presets };

static void must(VkResult r, const char *call) {
    if (r == VK_SUCCESS) return;
    fprintf(stderr, "vulkan_figures: %s: %d\n", call, r);
    exit(1);
}
#define MUST(call) must(call, #call)

static void open_device(device *d) {
    VkApplicationInfo app = {.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO, .apiVersion = VK_API_VERSION_1_1};
    VkInstanceCreateInfo instance_info = {.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO,
                                          .pApplicationInfo = &app};
    VkInstance instance;
    uint32_t one = 1;
    float priority = 1;
    MUST(vkCreateInstance(&instance_info, NULL, &instance));
    vkEnumeratePhysicalDevices(instance, &one, &d->physical);
    if (!one) fprintf(stderr, "vulkan_figures: there is no Vulkan device\n"), exit(1);
    VkPhysicalDeviceSubgroupProperties subgroup = {.sType =
                                                       VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES};
    VkPhysicalDeviceProperties2 properties = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2,
                                              .pNext = &subgroup};
    vkGetPhysicalDeviceProperties2(d->physical, &properties);
    snprintf(d->name, sizeof d->name, "%s", properties.properties.deviceName);
    d->subgroup = subgroup.subgroupSize;
    d->shared = properties.properties.limits.maxComputeSharedMemorySize;
    VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR executable = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PIPELINE_EXECUTABLE_PROPERTIES_FEATURES_KHR};
    VkPhysicalDevice16BitStorageFeatures storage = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES, .pNext = &executable};
    VkPhysicalDeviceShaderFloat16Int8Features half = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES, .pNext = &storage};
    VkPhysicalDeviceFeatures2 features = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2,
                                          .pNext = &half};
    vkGetPhysicalDeviceFeatures2(d->physical, &features); /* all of these that it has are enabled below */
    d->variants = (half.shaderFloat16 ? KVLI_VK_FP16 : 0) |
                  (storage.storageBuffer16BitAccess ? KVLI_VK_STORAGE16 : 0) | KVLI_VK_SUBGROUP;
    const char *extensions[] = {"VK_KHR_pipeline_executable_properties", "VK_KHR_shader_float16_int8"};
    VkDeviceQueueCreateInfo queue = {
        .sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO, .queueCount = 1, .pQueuePriorities = &priority};
    VkDeviceCreateInfo info = {.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
                               .pNext = &half,
                               .queueCreateInfoCount = 1,
                               .pQueueCreateInfos = &queue,
                               .enabledExtensionCount = 2,
                               .ppEnabledExtensionNames = extensions};
    MUST(vkCreateDevice(d->physical, &info, NULL, &d->device));
    d->executables = (PFN_vkGetPipelineExecutablePropertiesKHR)vkGetDeviceProcAddr(
        d->device, "vkGetPipelineExecutablePropertiesKHR");
    d->statistics = (PFN_vkGetPipelineExecutableStatisticsKHR)vkGetDeviceProcAddr(
        d->device, "vkGetPipelineExecutableStatisticsKHR");
    d->representations = (PFN_vkGetPipelineExecutableInternalRepresentationsKHR)vkGetDeviceProcAddr(
        d->device, "vkGetPipelineExecutableInternalRepresentationsKHR");
}

static void make_layout(device *d) {
    for (int set = 0; set < 2; set++) {
        VkDescriptorSetLayoutBinding b[6];
        uint32_t n = set ? 2 : 6;
        for (uint32_t i = 0; i < n; i++)
            b[i] = (VkDescriptorSetLayoutBinding){.binding = i,
                                                  .descriptorType = VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
                                                  .descriptorCount = !set && i == KVLI_VK_PAGES ? BANKS : 1,
                                                  .stageFlags = VK_SHADER_STAGE_COMPUTE_BIT};
        VkDescriptorSetLayoutCreateInfo info = {
            .sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO, .bindingCount = n, .pBindings = b};
        MUST(vkCreateDescriptorSetLayout(d->device, &info, NULL, &d->sets[set]));
    }
    VkPushConstantRange range = {.stageFlags = VK_SHADER_STAGE_COMPUTE_BIT, .size = sizeof(kvli_vk_push)};
    VkPipelineLayoutCreateInfo info = {.sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO,
                                       .setLayoutCount = 2,
                                       .pSetLayouts = d->sets,
                                       .pushConstantRangeCount = 1,
                                       .pPushConstantRanges = &range};
    MUST(vkCreatePipelineLayout(d->device, &info, NULL, &d->layout));
}

static VkPipeline make_pipeline(const device *d, const uint32_t *words, size_t bytes, const uint32_t *spec) {
    VkShaderModuleCreateInfo module_info = {
        .sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO, .codeSize = bytes, .pCode = words};
    VkShaderModule module;
    VkPipeline pipeline;
    VkSpecializationMapEntry entries[KVLI_VK_SPECIALISATIONS];
    for (uint32_t i = 0; i < KVLI_VK_SPECIALISATIONS; i++)
        entries[i] = (VkSpecializationMapEntry){i, 4 * i, 4};
    VkSpecializationInfo special = {KVLI_VK_SPECIALISATIONS, entries, 4 * KVLI_VK_SPECIALISATIONS, spec};
    MUST(vkCreateShaderModule(d->device, &module_info, NULL, &module));
    VkComputePipelineCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
        .flags = VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR |
                 VK_PIPELINE_CREATE_CAPTURE_INTERNAL_REPRESENTATIONS_BIT_KHR,
        .stage = {.sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO,
                  .stage = VK_SHADER_STAGE_COMPUTE_BIT,
                  .module = module,
                  .pName = "main",
                  .pSpecializationInfo = &special},
        .layout = d->layout};
    MUST(vkCreateComputePipelines(d->device, VK_NULL_HANDLE, 1, &info, NULL, &pipeline));
    vkDestroyShaderModule(d->device, module, NULL);
    return pipeline;
}

/* ---- what the compiler says ---- */

static void print_statistics(const device *d, VkPipelineExecutableInfoKHR *which) {
    VkPipelineExecutableStatisticKHR s[64];
    uint32_t n = 64;
    for (uint32_t i = 0; i < n; i++)
        s[i] =
            (VkPipelineExecutableStatisticKHR){.sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_STATISTIC_KHR};
    MUST(d->statistics(d->device, which, &n, s));
    for (uint32_t i = 0; i < n; i++)
        if (s[i].format == VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_UINT64_KHR)
            printf("stat %s: %llu\n", s[i].name, (unsigned long long)s[i].value.u64);
}

static void print_assembly(const device *d, VkPipelineExecutableInfoKHR *which) {
    VkPipelineExecutableInternalRepresentationKHR r[8];
    uint32_t n = 8;
    for (int filled = 0; filled < 2; filled++) { /* sizes, then texts */
        for (uint32_t i = 0; i < n; i++)
            r[i] = (VkPipelineExecutableInternalRepresentationKHR){
                .sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INTERNAL_REPRESENTATION_KHR,
                .dataSize = filled ? r[i].dataSize : 0,
                .pData = filled ? calloc(1, r[i].dataSize + 1) : NULL};
        MUST(d->representations(d->device, which, &n, r));
    }
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(r[i].name, "Assembly") == 0)
            for (char *line = strtok(r[i].pData, "\n"); line; line = strtok(NULL, "\n"))
                printf("asm %s\n", line);
    for (uint32_t i = 0; i < n; i++) free(r[i].pData);
}

static void print_pipeline(const device *d, VkPipeline pipeline) {
    VkPipelineInfoKHR info = {.sType = VK_STRUCTURE_TYPE_PIPELINE_INFO_KHR, .pipeline = pipeline};
    VkPipelineExecutablePropertiesKHR e = {.sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_PROPERTIES_KHR};
    uint32_t n = 1;
    MUST(d->executables(d->device, &info, &n, &e));
    VkPipelineExecutableInfoKHR which = {.sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INFO_KHR,
                                         .pipeline = pipeline};
    printf("stat subgroup: %u\n", e.subgroupSize ? e.subgroupSize : d->subgroup);
    print_statistics(d, &which);
    print_assembly(d, &which);
}

/* ---- the cases ---- */

static uint32_t *read_words(const char *folder, const char *shader, uint32_t variant, size_t *bytes) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s.%u.spv", folder, shader, variant);
    FILE *f = fopen(path, "rb");
    uint32_t *words = f ? calloc(1, 1 << 20) : NULL;
    *bytes = words ? fread(words, 1, 1 << 20, f) : 0;
    if (f) fclose(f);
    return words;
}

/* One line of the input: SHADER VARIANT PRESET DIM GQA, blocks of 32 tokens. What is shaped as the host shapes it. */
typedef struct job {
    char shader[32], preset[32];
    uint32_t variant, dim, gqa;
    uint32_t block_tokens, rows, workgroup, lanes;
} job;

static void shape(const device *d, job *j) {
    const uint32_t shuffles = j->variant & KVLI_VK_SUBGROUP ? d->subgroup : 0;
    j->block_tokens = 32;
    j->rows = kvli_vk_decode_rows(j->gqa);
    j->workgroup = strcmp(j->shader, "merge") == 0 ? KVLI_VK_MERGE_WORKGROUP : KVLI_VK_STORE_WORKGROUP;
    j->lanes = 4;
    if (strcmp(j->shader, "decode") == 0) {
        j->workgroup = kvli_vk_decode_workgroup(shuffles, 0);
        j->lanes = kvli_vk_decode_lanes(j->dim, j->rows, j->workgroup, shuffles, 0);
    }
    if (strcmp(j->shader, "prefill") == 0) {
        j->rows = kvli_vk_prefill_rows(j->dim, d->shared);
        j->workgroup = kvli_vk_prefill_workgroup(d->shared);
        j->lanes = kvli_vk_prefill_lanes(j->dim);
    }
}

static uint32_t tile_bytes(uint32_t format, const job *j) { /* without what pads it */
    return j->block_tokens *
               (kvli_gpu_row_bytes(format, j->dim) + kvli_gpu_token_scale_bytes(format, j->dim)) +
           kvli_gpu_channel_scale_bytes(format, j->dim);
}

static bool run_job(const device *d, const char *folder, const job *j) {
    uint32_t p = 0;
    size_t bytes;
    if (j->variant & ~d->variants) return true; /* not on this device */
    while (p < N_PRESETS && strcmp(presets[p].name, j->preset) != 0) p++;
    uint32_t *words = p < N_PRESETS ? read_words(folder, j->shader, j->variant, &bytes) : NULL;
    if (!words) {
        fprintf(stderr, "vulkan_figures: no shader %s.%u or no preset %s\n", j->shader, j->variant,
                j->preset);
        return false;
    }
    const uint32_t spec[KVLI_VK_SPECIALISATIONS] = {[KVLI_VK_WORKGROUP] = j->workgroup,
                                                    [KVLI_VK_BANKS] = BANKS,
                                                    [KVLI_VK_K_FORMAT] = presets[p].k,
                                                    [KVLI_VK_V_FORMAT] = presets[p].v,
                                                    [KVLI_VK_EXACT_FORMAT] = presets[p].exact,
                                                    [KVLI_VK_ROTATED] = presets[p].rotated,
                                                    [KVLI_VK_DIM] = j->dim,
                                                    [KVLI_VK_BLOCK_TOKENS] = j->block_tokens,
                                                    [KVLI_VK_ROWS] = j->rows,
                                                    [KVLI_VK_LANES] = j->lanes};
    printf(
        "pipeline shader=%s variant=%u preset=%s dim=%u block_tokens=%u gqa=%u rows=%u workgroup=%u lanes=%u "
        "tile_bytes=%u\n",
        j->shader, j->variant, j->preset, j->dim, j->block_tokens, j->gqa, j->rows, j->workgroup, j->lanes,
        tile_bytes(presets[p].k, j) + tile_bytes(presets[p].v, j));
    VkPipeline pipeline = make_pipeline(d, words, bytes, spec);
    print_pipeline(d, pipeline);
    vkDestroyPipeline(d->device, pipeline, NULL);
    free(words);
    return true;
}

int main(int argc, char **argv) {
    static device d;
    job j;
    bool ok = true;
    if (argc != 2) fprintf(stderr, "usage: vulkan_figures FOLDER <JOBS\n"), exit(2);
    open_device(&d);
    make_layout(&d);
    while (scanf("%31s %u %31s %u %u", j.shader, &j.variant, j.preset, &j.dim, &j.gqa) == 5) {
        shape(&d, &j);
        ok = run_job(&d, argv[1], &j) && ok;
    }
    return !ok;
}
