// What every device implements under the names of schema.cpp; included where its functions are registered.
m.impl("head_moments", &monet::head_moments);
m.impl("route", &monet::route);
m.impl("route_backward", &monet::route_backward);
m.impl("scatter_dense", &monet::scatter_dense);
m.impl("gather_dense", &monet::gather_dense);
m.impl("sum_over_tokens", &monet::sum_over_tokens);
m.impl("sum_over_tokens_backward", &monet::sum_over_tokens_backward);
m.impl("sum_of_largest", &monet::sum_of_largest);
m.impl("sum_of_largest_backward", &monet::sum_of_largest_backward);
m.impl("vertical_experts", &monet::vertical_experts);
m.impl("vertical_experts_backward", &monet::vertical_experts_backward);
m.impl("horizontal_experts", &monet::horizontal_experts);
m.impl("horizontal_experts_backward", &monet::horizontal_experts_backward);
m.impl("masked_totals", &monet::masked_totals);
m.impl("masked_totals_backward", &monet::masked_totals_backward);
m.impl("expert_bias", &monet::expert_bias);
m.impl("expert_bias_backward", &monet::expert_bias_backward);
