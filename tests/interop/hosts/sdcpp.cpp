// Drives the loader of stable-diffusion.cpp: its own classes name and apply, this file only asks.
//
// names BASE.safetensors: the version it takes the model for, what it calls each tensor of the file, and the tensors
// of its denoiser. apply VERSION MODEL.txt: for every "LORA OUTPUT" on standard input, what `LoraModel::apply` adds to
// weights of zeros of the shapes in MODEL.txt; each in a process of its own, because a failed check ends it.
//
// Compiled by `python -m tests.interop.hosts.sdcpp`.

#include <sys/select.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>

#include "ggml-cpu.h"
#include "model/adapter/lora.hpp"
#include "model/diffusion/anima.hpp"
#include "model/diffusion/ernie_image.hpp"
#include "model/diffusion/flux.hpp"
#include "model/diffusion/hidream_o1.hpp"
#include "model/diffusion/hunyuan.hpp"
#include "model/diffusion/ideogram4.hpp"
#include "model/diffusion/krea2.hpp"
#include "model/diffusion/ltxv.hpp"
#include "model/diffusion/minimax_h3.hpp"
#include "model/diffusion/mmdit.hpp"
#include "model/diffusion/qwen_image.hpp"
#include "model/diffusion/unet.hpp"
#include "model/diffusion/wan.hpp"
#include "model/diffusion/z_image.hpp"
#include "model_loader.h"
#include "model_manager.h"
#include "name_conversion.h"
#include "stable-diffusion.h"

// vocabularies of text encoders, which nothing here asks for
std::string load_t5_tokenizer_json() { return ""; }
std::string load_umt5_tokenizer_json() { return ""; }

// its loader looks five times a second whether all is read: here a thousand times
extern "C" int nanosleep(const timespec*, timespec*) {
    timeval wait = {0, 1000};
    return select(0, nullptr, nullptr, nullptr, &wait);
}

using Tensors = std::map<std::string, ggml_tensor*>;

static const std::string PREFIX = "model.diffusion_model";

template <typename Runner, typename... More>
static void build(Tensors& found, More&&... more) {
    // kept: the tensors are in its context
    auto* runner = new Runner(std::forward<More>(more)...);
    static_cast<DiffusionModelRunner*>(runner)->get_param_tensors(found);
}

static bool denoiser(Tensors& found, ggml_backend_t cpu, const String2TensorStorage& map, SDVersion version) {
    if (sd_version_is_unet(version)) {
        build<UNetModelRunner>(found, cpu, map, PREFIX, version);
    } else if (sd_version_is_sd3(version)) {
        build<MMDiTRunner>(found, cpu, map, PREFIX);
    } else if (sd_version_is_flux(version) || sd_version_is_flux2(version) || sd_version_is_longcat(version)) {
        build<Flux::FluxRunner>(found, cpu, map, PREFIX, version);
    } else if (sd_version_is_ideogram4(version)) {
        build<Ideogram4::Ideogram4Runner>(found, cpu, map, PREFIX);
    } else if (sd_version_is_krea2(version)) {
        build<Krea2::Krea2Runner>(found, cpu, map, PREFIX);
    } else if (sd_version_is_ltxav(version)) {
        build<LTXV::LTXAVRunner>(found, cpu, map, PREFIX);
    } else if (sd_version_is_minimax_h3(version)) {
        build<MiniMaxH3::MiniMaxH3Runner>(found, cpu, map, PREFIX);
    } else if (sd_version_is_hunyuan_video(version)) {
        build<Hunyuan::HunyuanVideoRunner>(found, cpu, map, PREFIX, version);
    } else if (sd_version_is_wan(version)) {
        build<WAN::WanRunner>(found, cpu, map, PREFIX, version);
    } else if (sd_version_is_qwen_image(version)) {
        build<Qwen::QwenImageRunner>(found, cpu, map, PREFIX, version);
    } else if (version == VERSION_HIDREAM_O1) {
        build<HiDreamO1::HiDreamO1Runner>(found, cpu, map, std::string("model"));
    } else if (sd_version_is_anima(version)) {
        build<Anima::AnimaRunner>(found, cpu, map, PREFIX);
    } else if (sd_version_is_z_image(version)) {
        build<ZImage::ZImageRunner>(found, cpu, map, PREFIX, version);
    } else if (sd_version_is_ernie_image(version)) {
        build<ErnieImage::ErnieImageRunner>(found, cpu, map, PREFIX);
    } else {
        return false;
    }
    return true;
}

static int names(ggml_backend_t cpu, const std::string& path) {
    ModelLoader raw;
    if (!raw.init_from_file(path)) {
        return 1;
    }
    // as it loads a model: it looks at the names before it converts them
    SDVersion version = raw.get_sd_version();
    printf("version %d\n", static_cast<int>(version));
    if (version == VERSION_COUNT) {
        return 0;
    }
    for (const auto& [name, storage] : raw.get_tensor_storage_map()) {
        printf("name %s %s\n", name.c_str(), convert_tensor_name(name, version).c_str());
    }
    ModelLoader loader;
    loader.init_from_file(path);
    loader.get_sd_version();
    ModelLoader converted;
    converted.init_from_file_and_convert_name(path, "", version);
    Tensors found;
    if (denoiser(found, cpu, converted.get_tensor_storage_map(), version)) {
        for (const auto& [name, tensor] : found) {
            printf("tensor %s %lld %lld %lld %lld\n", name.c_str(), (long long)tensor->ne[0], (long long)tensor->ne[1],
                   (long long)tensor->ne[2], (long long)tensor->ne[3]);
        }
    }
    return 0;
}

static int apply(ggml_backend_t cpu, SDVersion version, const std::string& model) {
    Tensors tensors;
    std::set<std::string> known;
    std::ifstream listing(model);
    std::string name;
    int64_t ne[4];
    ggml_init_params params = {ggml_tensor_overhead() * 65536, nullptr, true};
    ggml_context* context   = ggml_init(params);
    while (listing >> name >> ne[0] >> ne[1] >> ne[2] >> ne[3]) {
        ggml_tensor* tensor = ggml_new_tensor(context, GGML_TYPE_F32, 4, ne);
        ggml_set_name(tensor, name.c_str());
        tensors[name] = tensor;
        known.insert(name);
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(context, cpu);
    std::string line;
    printf("ready\n");
    fflush(stdout);
    while (std::getline(std::cin, line)) {
        std::istringstream words(line);
        std::string lora, output;
        words >> lora >> output;
        pid_t child = fork();
        if (child == 0) {
            ggml_backend_buffer_clear(buffer, 0);
            LoraModel adapter("adapter", cpu, cpu, lora, "", version);
            if (!adapter.load_from_file(1)) {
                _exit(3);
            }
            if (!adapter.lora_tensors.empty()) {
                adapter.apply(tensors, known, version, 1, false);
            }
            std::ofstream out(output, std::ios::binary);
            for (const auto& [key, tensor] : tensors) {
                const float* data   = static_cast<const float*>(tensor->data);
                const int64_t count = ggml_nelements(tensor);
                bool changed        = false;
                for (int64_t i = 0; i < count && !changed; i++) {
                    changed = data[i] != 0.0f;
                }
                if (changed) {
                    out << key << " " << count << "\n";
                    out.write(reinterpret_cast<const char*>(data), count * sizeof(float));
                }
            }
            out.close();
            _exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        printf("%d\n", WIFEXITED(status) ? WEXITSTATUS(status) : -1);
        fflush(stdout);
    }
    return 0;
}

int main(int count, char** words) {
    sd_set_log_callback([](sd_log_level_t, const char* text, void*) { fputs(text, stderr); }, nullptr);
    sd_set_progress_callback([](int, int, float, void*) {}, nullptr);
    ggml_backend_t cpu = ggml_backend_cpu_init();
    if (count == 3 && std::string(words[1]) == "names") {
        return names(cpu, words[2]);
    }
    if (count == 4 && std::string(words[1]) == "apply") {
        return apply(cpu, static_cast<SDVersion>(std::stoi(words[2])), words[3]);
    }
    return 2;
}
