// Schemas of every op. Implementations register themselves for their device in register_*.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastattn, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? "
      "slopes, Tensor? seed, Tensor? starts_q, Tensor? starts_k, bool is_causal, float scale, "
      "float dropout_p, int left, int right, float softcap) -> (Tensor out, Tensor lse, Tensor "
      "row_max, Tensor log_sum)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor "
      "value, Tensor? attn_mask, Tensor? slopes, Tensor out, Tensor row_max, Tensor log_sum, "
      "Tensor? "
      "seed, Tensor? "
      "starts_q, Tensor? starts_k, bool is_causal, float scale, float dropout_p, int left, int "
      "right, float softcap, bool[4] needs) -> (Tensor grad_query, Tensor grad_key, Tensor "
      "grad_value, Tensor grad_mask)");
  m.def(
      "attention_jvp(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? slopes, "
      "Tensor? t_query, Tensor? t_key, Tensor? t_value, Tensor? t_mask, Tensor out, "
      "Tensor row_max, Tensor log_sum, Tensor? seed, Tensor? starts_q, Tensor? starts_k, bool "
      "is_causal, float "
      "scale, float "
      "dropout_p, int left, int right, float softcap) -> (Tensor t_out, Tensor t_lse)");
  m.def(
      "attention_double_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor? attn_mask, Tensor? slopes, Tensor? t_query, Tensor? t_key, Tensor? "
      "t_value, Tensor? t_mask, Tensor out, Tensor row_max, Tensor log_sum, Tensor? seed, Tensor? "
      "starts_q, Tensor? "
      "starts_k, bool is_causal, float scale, float dropout_p, int left, int right, float softcap, "
      "bool[5] needs) -> (Tensor t_out, Tensor t_lse, Tensor g_query, Tensor g_key, Tensor "
      "g_value, Tensor g_mask)");
  m.def(
      "linear_relu_forward(Tensor input, Tensor weight, Tensor? bias) -> (Tensor out, Tensor "
      "mask)");
  m.def(
      "linear_relu_backward(Tensor grad_out, Tensor input, Tensor weight, Tensor mask, bool[3] "
      "needs) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "linear_relu_jvp(Tensor input, Tensor weight, Tensor mask, Tensor? t_input, Tensor? "
      "t_weight, "
      "Tensor? t_bias) -> Tensor");
  m.def("mlp_forward(Tensor input, Tensor[] weights, Tensor[] biases) -> Tensor[]");
  m.def("mlp_inference(Tensor input, Tensor[] weights, Tensor[] biases) -> Tensor");
  m.def(
      "mlp_backward(Tensor grad_out, Tensor input, Tensor[] weights, Tensor[] hidden, bool[] "
      "needs) -> Tensor[]");
  m.def("fma_probe(Tensor like, int iterations) -> int");
}
