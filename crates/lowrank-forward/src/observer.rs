//! How calibration and the verifier watch the inputs and outputs of experts.

/// Tokens of one expert, in rising order. An expert with many tokens is shown in several batches, one after another.
#[derive(Debug, Clone, Copy)]
pub struct ExpertBatch<'a> {
    /// Decoder layer.
    pub layer: usize,
    /// Expert of that layer; [`SHARED_EXPERT`](lowrank_model::SHARED_EXPERT) only where that is compressed.
    pub expert: usize,
    /// `[n]`: which of the N tokens.
    pub tokens: &'a [usize],
    /// `[n]`: the router's weight of each.
    pub weights: &'a [f32],
    /// [n, H]: inputs of w1 and w3.
    pub x: &'a [f32],
    /// [n, F]: w1 x.
    pub gate: &'a [f32],
    /// [n, F]: w3 x.
    pub up: &'a [f32],
    /// [n, F]: silu(gate) ∘ up, the inputs of w2.
    pub activations: &'a [f32],
    /// [n, H]: w2's outputs, before the router's weight.
    pub y: &'a [f32],
}

/// Input and output of one layer's MoE block.
#[derive(Debug, Clone, Copy)]
pub struct MoeBlock<'a> {
    /// Decoder layer.
    pub layer: usize,
    /// [N, H]: the normed states.
    pub input: &'a [f32],
    /// [N, H]: Σ_e g_e · expert_e(input).
    pub output: &'a [f32],
}

/// Called on the thread that runs the layer, in a fixed order: layers, then experts, then tokens rise.
pub trait Observer {
    /// Whether [`Observer::expert`] is used: if not, a device does not copy its intermediate results to the host.
    fn sees_experts(&self) -> bool {
        true
    }
    /// One expert has computed these tokens.
    fn expert(&mut self, _batch: &ExpertBatch<'_>) {}
    /// All experts of a layer are done.
    fn block(&mut self, _block: &MoeBlock<'_>) {}
}

/// Observes nothing.
impl Observer for () {
    fn sees_experts(&self) -> bool {
        false
    }
}
