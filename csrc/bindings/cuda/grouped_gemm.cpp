#include "cuda/grouped_gemm.h"
#include "bindings/cuda/pointers.h"
#include "cuda/sm90/grouped_gemm.h"

#include <tuple>

#include <pybind11/stl.h>

namespace pyroute::cuda {

void bind_grouped_gemm(py::module_ &module);

namespace {

// (address, type, address of scales or 0, rows of scales of one matrix, block rows, block cols, whether blocks restart)
using OperandTuple = std::tuple<uintptr_t, int, uintptr_t, int64_t, int64_t, int64_t, bool>;

GemmOperand operand(const OperandTuple &tuple) {
    GemmOperand o = {};
    o.data = pointer<const void>(std::get<0>(tuple));
    o.type = static_cast<ElementType>(std::get<1>(tuple));
    o.scales = pointer<const float>(std::get<2>(tuple));
    o.scale_rows = std::get<3>(tuple);
    o.block_rows = std::get<4>(tuple);
    o.block_cols = std::get<5>(tuple);
    return o;
}
bool restarts(const OperandTuple &tuple) { return std::get<6>(tuple); }

// (address of expert_offsets, or of tokens_per_expert and the rows of an expert; rows; experts, N, K; segments_only)
using RowsTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;

GroupedGemmArgs forward_args(const OperandTuple &a, const OperandTuple &b, const RowsTuple &rows, uintptr_t out,
                             int out_type) {
    GroupedGemmArgs args = {};
    args.a = operand(a);
    args.b = operand(b);
    args.out = pointer<void>(out);
    args.out_type = static_cast<ElementType>(out_type);
    args.expert_offsets = pointer<const int64_t>(std::get<0>(rows));
    args.tokens_per_expert = pointer<const int32_t>(std::get<1>(rows));
    args.rows_per_expert = std::get<2>(rows);
    args.num_rows = std::get<3>(rows);
    args.num_experts = std::get<4>(rows);
    args.n = std::get<5>(rows);
    args.k = std::get<6>(rows);
    args.segments_only = std::get<7>(rows);
    return args;
}

GroupedGemmWgradArgs wgrad_args(const OperandTuple &grad_out, const OperandTuple &a, uintptr_t expert_offsets,
                                uintptr_t out, bool accumulate, int64_t num_rows, int64_t num_experts, int64_t n,
                                int64_t k) {
    return {operand(grad_out),   operand(a), pointer<const int64_t>(expert_offsets),
            pointer<float>(out), accumulate, num_rows,
            num_experts,         n,          k};
}

} // namespace

void bind_grouped_gemm(py::module_ &module) {
    module.def("grouped_gemm_workspace",
               [](int device, uintptr_t stream, const OperandTuple &a, const OperandTuple &b, const RowsTuple &rows,
                  int out_type, bool transposed, uintptr_t b_transposed) {
                   return grouped_gemm_workspace(stream_of(device, stream), forward_args(a, b, rows, 0, out_type),
                                                 transposed, pointer<const uint8_t>(b_transposed));
               });
    module.def("grouped_gemm",
               [](int device, uintptr_t stream, const OperandTuple &a, const OperandTuple &b, const RowsTuple &rows,
                  int out_type, bool transposed, uintptr_t b_transposed, uintptr_t out, uintptr_t workspace) {
                   const GroupedGemmArgs args = forward_args(a, b, rows, out, out_type);
                   const Stream on = stream_of(device, stream);
                   if (transposed)
                       grouped_gemm_dgrad(on, args, {restarts(a), false}, pointer<const uint8_t>(b_transposed),
                                          pointer<void>(workspace));
                   else
                       grouped_gemm(on, args, {restarts(a), false}, pointer<void>(workspace));
               });
    module.def("grouped_gemm_wants_transposed",
               [](int device, const OperandTuple &b, int64_t num_experts, int64_t n, int64_t k) {
                   return grouped_gemm_wants_transposed(device, operand(b), num_experts, n, k);
               });
    module.def("grouped_gemm_transpose", [](int device, uintptr_t stream, const OperandTuple &b, int64_t num_experts,
                                            int64_t n, int64_t k, uintptr_t to) {
        grouped_gemm_transpose(stream_of(device, stream), operand(b), num_experts, n, k, pointer<uint8_t>(to));
    });
    module.def("grouped_gemm_wgrad_workspace", [](int device, uintptr_t stream, const OperandTuple &grad_out,
                                                  const OperandTuple &a, bool accumulate, int64_t num_rows,
                                                  int64_t num_experts, int64_t n, int64_t k) {
        return grouped_gemm_wgrad_workspace(stream_of(device, stream),
                                            wgrad_args(grad_out, a, 0, 0, accumulate, num_rows, num_experts, n, k),
                                            {restarts(a), restarts(grad_out)});
    });
    module.def("grouped_gemm_wgrad",
               [](int device, uintptr_t stream, const OperandTuple &grad_out, const OperandTuple &a,
                  uintptr_t expert_offsets, uintptr_t out, bool accumulate, int64_t num_rows, int64_t num_experts,
                  int64_t n, int64_t k, uintptr_t workspace) {
                   const GroupedGemmWgradArgs args =
                       wgrad_args(grad_out, a, expert_offsets, out, accumulate, num_rows, num_experts, n, k);
                   grouped_gemm_wgrad(stream_of(device, stream), args, {restarts(a), restarts(grad_out)},
                                      pointer<void>(workspace));
               });
    // For kernels built with PYROUTE_HANG_TRAP: pinned memory of the host, 32 bytes for each multiprocessor, or 0.
    module.def("report_hangs_to", [](uintptr_t words) { sm90::report_hangs_to(pointer<uint32_t>(words)); });
}

} // namespace pyroute::cuda
