/* Vulkan for tests: Mesa's lavapipe, which runs on the CPU, and Khronos' validation layer. No Vulkan function is called
   here; what is set must be set before the loader is opened. */
#ifndef KVL_TESTS_VK_ENV_H
#define KVL_TESTS_VK_ENV_H
#include <glob.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static inline bool vk_env_find(const char *const *patterns, char *path, size_t size) {
    glob_t found;
    for (; *patterns; patterns++) {
        bool there = !glob(*patterns, 0, NULL, &found) && found.gl_pathc > 0;
        if (there) snprintf(path, size, "%s", found.gl_pathv[0]);
        globfree(&found);
        if (there) return true;
    }
    return false;
}

/* This process's Vulkan is lavapipe alone, with vectors of 128, 256 or 512 bits (subgroups of 4, 8, 16), whose compiled
   shaders are kept in build/: its cache does not tell the widths apart. False, with a line that says SKIP, where lavapipe or the
   validation layer is not installed. */
static inline bool vk_env_lavapipe(unsigned bits) {
    static const char *const drivers[] = {"/usr/share/vulkan/icd.d/lvp_icd.*json",
                                          "/usr/local/share/vulkan/icd.d/lvp_icd.*json",
                                          "/etc/vulkan/icd.d/lvp_icd.*json", NULL};
    static const char *const layers[] = {
        "/usr/share/vulkan/explicit_layer.d/VkLayer_khronos_validation.json",
        "/usr/local/share/vulkan/explicit_layer.d/VkLayer_khronos_validation.json",
        "/etc/vulkan/explicit_layer.d/VkLayer_khronos_validation.json", NULL};
    char driver[512], layer[512], number[16], folder[64];
    if (!vk_env_find(drivers, driver, sizeof driver)) {
        printf("SKIP lavapipe, Mesa's Vulkan driver for the CPU, is not there (make deps)\n");
        return false;
    }
    if (!vk_env_find(layers, layer, sizeof layer)) {
        printf("SKIP Vulkan's validation layer is not there (make deps)\n");
        return false;
    }
    snprintf(number, sizeof number, "%u", bits);
    snprintf(folder, sizeof folder, "build/vulkan_shaders/%u", bits);
    mkdir("build", 0777);
    mkdir("build/vulkan_shaders", 0777);
    mkdir(folder, 0777);
    setenv("VK_ICD_FILENAMES", driver, 1);
    setenv("VK_DRIVER_FILES", driver, 1);
    setenv("VK_LOADER_LAYERS_DISABLE", "~implicit~", 1);
    setenv("LP_NATIVE_VECTOR_WIDTH", number, 1);
    setenv("MESA_SHADER_CACHE_DIR", folder, 1);
    return true;
}
#endif
