#include "cuda/permutation.h"
#include "bindings/cuda/pointers.h"
#include "cuda/route_plan.h"

namespace pyroute::cuda {

void bind_permutation(py::module_ &module);

namespace {

// Of a plan, in this order: num_tokens, top_k, num_rows, row_to_token, token_to_row.
using Maps = std::tuple<int64_t, int64_t, int64_t, uintptr_t, uintptr_t>;

RouteMaps maps_of(const Maps &maps) {
    return {std::get<0>(maps), std::get<1>(maps), std::get<2>(maps), pointer<const int32_t>(std::get<3>(maps)),
            pointer<const int32_t>(std::get<4>(maps))};
}

void plan_routes_of(int device, uintptr_t stream, uintptr_t topk_idx, int64_t id_bytes, bool id_signed,
                    int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t alignment, int64_t num_rows,
                    uintptr_t tokens_per_expert, uintptr_t expert_offsets, uintptr_t row_to_token,
                    uintptr_t token_to_row, uintptr_t workspace) {
    PlanRoutesArgs args = {};
    args.num_slots = num_tokens * top_k;
    args.top_k = top_k;
    args.num_experts = num_experts;
    args.alignment = alignment;
    args.num_rows = num_rows;
    args.topk_idx = pointer<const void>(topk_idx);
    args.id_bytes = static_cast<int32_t>(id_bytes);
    args.id_signed = id_signed;
    args.tokens_per_expert = pointer<int32_t>(tokens_per_expert);
    args.expert_offsets = pointer<int64_t>(expert_offsets);
    args.row_to_token = pointer<int32_t>(row_to_token);
    args.token_to_row = pointer<int32_t>(token_to_row);
    plan_routes(stream_of(device, stream), args, pointer<void>(workspace));
}

void write_layout_of(int device, uintptr_t stream, const std::string &layout, const Maps &maps, int64_t num_experts,
                     uintptr_t expert_offsets, uintptr_t out) {
    const RouteLayout which = layout == "ends"          ? RouteLayout::ends
                              : layout == "row_experts" ? RouteLayout::row_experts
                              : layout == "dense_map"   ? RouteLayout::dense_map
                                                        : RouteLayout::rows_by_slot;
    write_layout(stream_of(device, stream), which,
                 {maps_of(maps), num_experts, pointer<const int64_t>(expert_offsets), pointer<void>(out)});
}

void permute_of(int device, uintptr_t stream, const Maps &maps, int64_t row_bytes, uint32_t padding, uintptr_t x,
                uintptr_t rows, uintptr_t rows_end) {
    permute(stream_of(device, stream), {maps_of(maps), row_bytes, pointer<const uint8_t>(x), pointer<uint8_t>(rows)},
            padding, pointer<const int64_t>(rows_end));
}

void permute_quantize_of(int device, uintptr_t stream, const Maps &maps, int64_t hidden, int x_type, uintptr_t x,
                         bool power_of_two, uintptr_t codes, uintptr_t scales, uintptr_t rows_end) {
    permute_quantize(stream_of(device, stream),
                     {maps_of(maps), hidden, quantize_block, static_cast<FloatType>(x_type), pointer<const void>(x),
                      power_of_two, pointer<uint8_t>(codes), pointer<float>(scales)},
                     pointer<const int64_t>(rows_end));
}

void unpermute_of(int device, uintptr_t stream, const Maps &maps, int64_t hidden, int type, uintptr_t rows,
                  uintptr_t topk_weights, uintptr_t out) {
    unpermute(stream_of(device, stream),
              {maps_of(maps), hidden, static_cast<FloatType>(type), pointer<const void>(rows),
               pointer<const void>(topk_weights), pointer<void>(out), false});
}

void unpermute_backward_of(int device, uintptr_t stream, const Maps &maps, int64_t hidden, int type, uintptr_t grad_y,
                           uintptr_t rows, uintptr_t topk_weights, uintptr_t grad_rows, uintptr_t grad_topk_weights,
                           uintptr_t rows_end) {
    unpermute_backward(stream_of(device, stream),
                       {maps_of(maps), hidden, static_cast<FloatType>(type), pointer<const void>(grad_y),
                        pointer<const void>(rows), pointer<const void>(topk_weights), pointer<void>(grad_rows),
                        pointer<void>(grad_topk_weights), false},
                       pointer<const int64_t>(rows_end));
}

} // namespace

void bind_permutation(py::module_ &module) {
    module.def("plan_routes_workspace", &plan_routes_workspace, py::arg("num_slots"), py::arg("num_experts"));
    module.def("plan_routes", &plan_routes_of, py::arg("device"), py::arg("stream"), py::arg("topk_idx"),
               py::arg("id_bytes"), py::arg("id_signed"), py::arg("num_tokens"), py::arg("top_k"),
               py::arg("num_experts"), py::arg("alignment"), py::arg("num_rows"), py::arg("tokens_per_expert"),
               py::arg("expert_offsets"), py::arg("row_to_token"), py::arg("token_to_row"), py::arg("workspace"));
    module.def("write_layout", &write_layout_of, py::arg("device"), py::arg("stream"), py::arg("layout"),
               py::arg("maps"), py::arg("num_experts"), py::arg("expert_offsets"), py::arg("out"));
    module.def("permute", &permute_of, py::arg("device"), py::arg("stream"), py::arg("maps"), py::arg("row_bytes"),
               py::arg("padding"), py::arg("x"), py::arg("rows"), py::arg("rows_end") = 0);
    module.def("permute_quantize", &permute_quantize_of, py::arg("device"), py::arg("stream"), py::arg("maps"),
               py::arg("hidden"), py::arg("x_type"), py::arg("x"), py::arg("power_of_two"), py::arg("codes"),
               py::arg("scales"), py::arg("rows_end") = 0);
    module.def("unpermute", &unpermute_of, py::arg("device"), py::arg("stream"), py::arg("maps"), py::arg("hidden"),
               py::arg("type"), py::arg("rows"), py::arg("topk_weights"), py::arg("out"));
    module.def("unpermute_backward", &unpermute_backward_of, py::arg("device"), py::arg("stream"), py::arg("maps"),
               py::arg("hidden"), py::arg("type"), py::arg("grad_y"), py::arg("rows"), py::arg("topk_weights"),
               py::arg("grad_rows"), py::arg("grad_topk_weights"), py::arg("rows_end") = 0);
}

} // namespace pyroute::cuda
