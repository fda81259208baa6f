//! The operations of a model on a device, one launch or a few each.

use super::step::Step;
use super::{BLOCK, DeviceRows, int, launch, launch_shared, long};
use crate::gpu::{Arg, Buffer, Gpu, GpuError};
use crate::kernels::delta_rule::Heads;
use crate::memory::pool::{BLOCK as TOKENS, KvNumbers};
use crate::memory::slot::DeltaPlace;

type Result<T> = std::result::Result<T, GpuError>;

fn at(buffer: &Buffer) -> Arg {
    Arg::Address(buffer.address())
}

/// See [`rms_norm`](crate::kernels::rows::rms_norm).
pub(crate) fn rms_norm(x: &DeviceRows, scale: &Buffer, eps: f32) -> Result<DeviceRows> {
    let y = DeviceRows::new(x.gpu(), x.count(), x.width())?;
    let args = [x.arg(), at(scale), y.arg(), int(x.width()), Arg::Float(eps)];
    launch(x.gpu(), "rms_norm", [x.count(), 1, 1], BLOCK, &args)?;
    Ok(y)
}

/// See [`add_rms_norm`](crate::kernels::rows::add_rms_norm).
pub(crate) fn add_rms_norm(
    h: &DeviceRows,
    x: &DeviceRows,
    scale: &Buffer,
    eps: f32,
) -> Result<DeviceRows> {
    let y = DeviceRows::new(x.gpu(), x.count(), x.width())?;
    let width = int(x.width());
    let args = [h.arg(), x.arg(), at(scale), y.arg(), width, Arg::Float(eps)];
    launch(x.gpu(), "add_rms_norm", [x.count(), 1, 1], BLOCK, &args)?;
    Ok(y)
}

/// Blocks for `count` numbers, one a thread.
fn blocks(count: usize) -> [usize; 3] {
    [count.div_ceil(BLOCK as usize), 1, 1]
}

/// `h ← h + x`.
pub(crate) fn add(h: &DeviceRows, x: &DeviceRows) -> Result<()> {
    let count = x.count() * x.width();
    let args = [h.arg(), x.arg(), long(count)];
    launch(x.gpu(), "add", blocks(count), BLOCK, &args)
}

/// `silu(gate) ∘ up`.
pub(crate) fn swiglu(gate: &DeviceRows, up: &DeviceRows) -> Result<DeviceRows> {
    let y = DeviceRows::new(up.gpu(), up.count(), up.width())?;
    let count = up.count() * up.width();
    let args = [gate.arg(), up.arg(), y.arg(), long(count)];
    launch(up.gpu(), "swiglu", blocks(count), BLOCK, &args)?;
    Ok(y)
}

/// [`swiglu`] of the first half of the rows of `both`, gates, and the second.
pub(crate) fn swiglu_of_halves(both: &DeviceRows) -> Result<DeviceRows> {
    let y = DeviceRows::new(both.gpu(), both.count() / 2, both.width())?;
    let count = y.count() * y.width();
    let up = Arg::Address(both.row(y.count()));
    let args = [both.arg(), up, y.arg(), long(count)];
    launch(y.gpu(), "swiglu", blocks(count), BLOCK, &args)?;
    Ok(y)
}

/// The rows of `x` at the places in the table `index`, of which there are `count`.
fn gather(x: &DeviceRows, index: Arg, count: usize) -> Result<DeviceRows> {
    let y = DeviceRows::new(x.gpu(), count, x.width())?;
    let args = [x.arg(), index, y.arg(), int(x.width())];
    launch(x.gpu(), "gather_rows", [count, 1, 1], BLOCK, &args)?;
    Ok(y)
}

/// The rows that need logits.
pub(crate) fn wanted(x: &DeviceRows, step: &Step) -> Result<DeviceRows> {
    gather(x, step.wanted(), step.shape.wanted)
}

/// The rows of `x` that `index` names.
pub(crate) fn gather_rows(x: &DeviceRows, index: &[i32]) -> Result<DeviceRows> {
    let table = table(x.gpu(), index)?;
    gather(x, table.arg(), index.len())
}

/// A few numbers of four bytes that a kernel is to read.
fn table<T: bytemuck::NoUninit>(gpu: &Gpu, numbers: &[T]) -> Result<DeviceRows> {
    let table = DeviceRows::new(gpu, 1, numbers.len())?;
    let bytes = bytemuck::cast_slice(numbers);
    gpu.driver().upload(table.address(), bytes)?;
    Ok(table)
}

/// `sum[index[i]] ← sum[index[i]] + weights[i] · x[i]`; no place comes twice.
pub(crate) fn scatter_add(
    sum: &DeviceRows,
    x: &DeviceRows,
    index: &[i32],
    weights: &[f32],
) -> Result<()> {
    let (places, weights) = (table(x.gpu(), index)?, table(x.gpu(), weights)?);
    let width = int(x.width());
    let args = [sum.arg(), x.arg(), places.arg(), weights.arg(), width];
    launch(x.gpu(), "scatter_add", [index.len(), 1, 1], BLOCK, &args)
}

/// Row by row `x ← x · sigmoid(gate)`; `gates` is (t, 1).
pub(crate) fn scale_by_sigmoid(x: &DeviceRows, gates: &DeviceRows) -> Result<()> {
    let args = [x.arg(), gates.arg(), int(x.width())];
    launch(x.gpu(), "scale_by_sigmoid", [x.count(), 1, 1], BLOCK, &args)
}

/// `[x | y]`, row by row.
pub(crate) fn side_by_side(x: &DeviceRows, y: &DeviceRows) -> Result<DeviceRows> {
    let both = DeviceRows::new(x.gpu(), x.count(), x.width() + y.width())?;
    let args = [x.arg(), y.arg(), both.arg(), int(x.width()), int(y.width())];
    launch(x.gpu(), "side_by_side", [x.count(), 1, 1], BLOCK, &args)?;
    Ok(both)
}

/// What a gated delta net keeps beside its projections.
pub(crate) struct DeltaNet<'a> {
    pub(crate) heads: Heads,
    pub(crate) taps: usize,
    /// `(taps, channels)`.
    pub(crate) conv: &'a Buffer,
    /// `exp(A_log)`.
    pub(crate) rate: &'a Buffer,
    pub(crate) dt_bias: &'a Buffer,
    pub(crate) norm: &'a Buffer,
    pub(crate) eps: f32,
}

/// Rows that one block of the convolution computes.
const CONV_ROWS: usize = 64;
/// Columns of a state that one block of the delta rule holds.
const DELTA_COLUMNS: usize = 32;
const DELTA_THREADS: u32 = 128;

/// Convolution, delta rule and gated norm over all sequences of the step, whose states advance: from projections
/// (t, channels), (t, value heads · value dim) and twice (t, value heads) to (t, value heads · value dim).
pub(crate) fn delta_net(
    [qkv, z, b, a]: [&DeviceRows; 4],
    net: &DeltaNet<'_>,
    place: &DeltaPlace,
    step: &Step,
) -> Result<DeviceRows> {
    let gpu = qkv.gpu();
    let Heads {
        key,
        value,
        key_dim,
        value_dim,
    } = net.heads;
    let channels = net.heads.channels();
    let segments = step.shape.segments;
    let offset = long(place.offset);
    let trail = long(place.trail_offset(step.trail_rows));
    let convolved = DeviceRows::new(gpu, qkv.count(), channels)?;
    launch(
        gpu,
        "causal_conv",
        [
            channels.div_ceil(BLOCK as usize),
            step.longest.div_ceil(CONV_ROWS),
            segments,
        ],
        BLOCK,
        &[
            qkv.arg(),
            at(net.conv),
            convolved.arg(),
            step.slots(0),
            offset,
            step.starts(0),
            step.trails(0),
            trail,
            int(channels),
            int(net.taps),
            int(CONV_ROWS),
        ],
    )?;
    launch(
        gpu,
        "l2_norm_heads",
        [convolved.count(), 2 * key, 1],
        32,
        &[convolved.arg(), int(channels), int(key), int(key_dim)],
    )?;
    let mixed = DeviceRows::new(gpu, qkv.count(), value * value_dim)?;
    let rule = DeltaRule {
        convolved: &convolved,
        b,
        a,
        net,
        place,
        step,
        out: &mixed,
    };
    // sequences with many rows by whole chunks, where there are kernels for that
    let (few, many) = (step.few.0, step.shape.segments - step.few.0);
    if many > 0 && step.trail_rows == 0 && (key_dim, value_dim) == (CHUNKED_DIM, CHUNKED_DIM) {
        rule.scan(few)?;
        rule.by_chunks(few)?;
    } else {
        rule.scan(segments)?;
    }
    launch(
        gpu,
        "gated_rms_norm",
        [mixed.count() * value, 1, 1],
        128,
        &[
            mixed.arg(),
            z.arg(),
            at(net.norm),
            int(value_dim),
            Arg::Float(net.eps),
        ],
    )?;
    Ok(mixed)
}

/// The width of keys and values that there are kernels by chunks for.
const CHUNKED_DIM: usize = 128;

/// The delta rule over the sequences of a step.
struct DeltaRule<'a> {
    convolved: &'a DeviceRows,
    b: &'a DeviceRows,
    a: &'a DeviceRows,
    net: &'a DeltaNet<'a>,
    place: &'a DeltaPlace,
    step: &'a Step,
    out: &'a DeviceRows,
}

impl DeltaRule<'_> {
    /// Row by row, the first `segments` sequences.
    fn scan(&self, segments: usize) -> Result<()> {
        let heads = self.net.heads;
        let kernel = match heads.key_dim {
            16 => "delta_rule_16",
            32 => "delta_rule_32",
            64 => "delta_rule_64",
            _ => "delta_rule_128", // see `suits_delta_net`
        };
        launch(
            self.convolved.gpu(),
            kernel,
            [
                heads.value_dim.div_ceil(DELTA_COLUMNS),
                heads.value,
                segments,
            ],
            DELTA_THREADS,
            &[
                self.convolved.arg(),
                self.b.arg(),
                self.a.arg(),
                at(self.net.rate),
                at(self.net.dt_bias),
                self.out.arg(),
                self.step.slots(0),
                long(self.place.offset),
                self.step.starts(0),
                self.step.trails(0),
                long(self.place.trail_offset(self.step.trail_rows)),
                int(heads.channels()),
                int(heads.key),
                int(heads.value),
                int(heads.value_dim),
                int(self.place.tail),
            ],
        )
    }

    /// The sequences from `first` on: all chunks at once as far as they do not need the state, and then one after another.
    fn by_chunks(&self, first: usize) -> Result<()> {
        /// Rows of a chunk, and the bytes of what one leaves for the second pass.
        const CHUNK: usize = 64;
        const RECORD: usize = 147_712;
        const PREPARE: (u32, u32) = (128, 87_808);
        /// Threads that share 32 columns of a state, and their bytes of shared memory.
        const GROUP: (u32, u32) = (128, 24_576);
        let (gpu, heads) = (self.convolved.gpu(), self.net.heads);
        let segments = self.step.shape.segments - first;
        let rows = self.convolved.count() - self.step.few.1;
        let records = heads.value * (rows / CHUNK + segments);
        let scratch = gpu.scratch(records * RECORD)?;
        let scratch = Arg::Address(scratch.address());
        launch_shared(
            gpu,
            "delta_chunk_prepare_128",
            [self.step.longest.div_ceil(CHUNK), heads.value, segments],
            PREPARE,
            &[
                self.convolved.arg(),
                self.b.arg(),
                self.a.arg(),
                at(self.net.rate),
                at(self.net.dt_bias),
                self.step.starts(first),
                scratch,
                int(heads.channels()),
                int(heads.key),
                int(heads.value),
            ],
        )?;
        // two groups a block read the scratch half as often; one makes more blocks
        let processors = gpu.driver().processors() as usize;
        let groups = if 4 * heads.value * segments <= 2 * processors {
            1
        } else {
            2
        };
        let (threads, shared) = GROUP;
        launch_shared(
            gpu,
            "delta_chunk_scan_128",
            [4 / groups, heads.value, segments],
            (threads * groups as u32, shared * groups as u32),
            &[
                scratch,
                self.out.arg(),
                self.step.slots(first),
                long(self.place.offset),
                self.step.starts(first),
                int(heads.value),
                int(self.place.tail),
            ],
        )
    }
}

/// What full attention keeps beside its projections.
pub(crate) struct FullAttention<'a> {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) q_norm: &'a Buffer,
    pub(crate) k_norm: &'a Buffer,
    pub(crate) eps: f32,
    /// One for each pair of dimensions that turns.
    pub(crate) frequencies: &'a Buffer,
    pub(crate) turning: usize,
    /// What keys and values are held as.
    pub(crate) kv: KvNumbers,
}

fn only(what: &'static str, found: usize, made_for: &'static str, suits: bool) -> Result<()> {
    if suits {
        return Ok(());
    }
    Err(GpuError::Size {
        what,
        found,
        made_for,
    })
}

/// Whether there are kernels for attention with heads of `dim`, `group` of which share keys and values.
pub(crate) fn suits_attention(dim: usize, group: usize) -> Result<()> {
    let dims = [32, 64, 128, 256];
    only(
        "head dimension",
        dim,
        "32, 64, 128 and 256",
        dims.contains(&dim),
    )?;
    only(
        "query heads a kv head",
        group,
        "1 to 16",
        (1..=16).contains(&group),
    )
}

/// Whether there are kernels for a gated delta net with keys of `key_dim` and a convolution over `taps` rows.
pub(crate) fn suits_delta_net(key_dim: usize, taps: usize) -> Result<()> {
    let dims = [16, 32, 64, 128];
    only(
        "key dimension",
        key_dim,
        "16, 32, 64 and 128",
        dims.contains(&key_dim),
    )?;
    only(
        "rows of a convolution",
        taps,
        "1 to 8",
        (1..=8).contains(&taps),
    )
}

/// Norms and turns queries and keys, appends keys and values to their sequences, attends and gates: from projections
/// (t, heads · 2 dim), and twice (t, kv heads · dim), to (t, heads · dim). `layer` is the place in blocks.
pub(crate) fn attention(
    [both, keys, values]: [&DeviceRows; 3],
    full: &FullAttention<'_>,
    layer: usize,
    step: &Step,
) -> Result<DeviceRows> {
    let gpu = both.gpu();
    let FullAttention {
        heads,
        kv_heads,
        dim,
        ..
    } = *full;
    let rows = both.count();
    let queries = DeviceRows::new(gpu, rows, heads * dim)?;
    let width = int(step.shape.table_width);
    let prepare = match full.kv {
        KvNumbers::F32 => "attention_prepare_f32",
        KvNumbers::Bf16 => "attention_prepare_bf16",
    };
    launch(
        gpu,
        prepare,
        [rows, heads + kv_heads, 1],
        128,
        &[
            both.arg(),
            keys.arg(),
            values.arg(),
            at(full.q_norm),
            at(full.k_norm),
            at(full.frequencies),
            queries.arg(),
            step.blocks(0),
            width,
            step.row_segment(),
            step.positions(),
            int(heads),
            int(kv_heads),
            int(dim),
            int(full.turning),
            int(layer),
            Arg::Float(full.eps),
        ],
    )?;
    let out = DeviceRows::new(gpu, rows, heads * dim)?;
    let (few, few_rows) = step.few;
    if few_rows > 0 {
        decode(&queries, both, &out, full, layer, step, few_rows)?;
    }
    if few < step.shape.segments {
        prefill(&queries, both, &out, full, layer, step, few)?;
    }
    Ok(out)
}

/// The kernel for these keys and values and this width of heads, see [`suits_attention`].
macro_rules! by_kv_and_dim {
    ($full:expr, $name:literal) => {
        match ($full.kv, $full.dim) {
            (KvNumbers::F32, 32) => concat!($name, "_f32_32"),
            (KvNumbers::F32, 64) => concat!($name, "_f32_64"),
            (KvNumbers::F32, 128) => concat!($name, "_f32_128"),
            (KvNumbers::F32, _) => concat!($name, "_f32_256"),
            (KvNumbers::Bf16, 32) => concat!($name, "_bf16_32"),
            (KvNumbers::Bf16, 64) => concat!($name, "_bf16_64"),
            (KvNumbers::Bf16, 128) => concat!($name, "_bf16_128"),
            (KvNumbers::Bf16, _) => concat!($name, "_bf16_256"),
        }
    };
}

/// Rows of sequences with few rows each: tokens before them are shared out among blocks.
fn decode(
    queries: &DeviceRows,
    both: &DeviceRows,
    out: &DeviceRows,
    full: &FullAttention<'_>,
    layer: usize,
    step: &Step,
    rows: usize,
) -> Result<()> {
    /// Blocks for each processor.
    const EACH: usize = 4;
    /// Tokens that a block reads at the least.
    const LEAST: usize = 64;
    let gpu = queries.gpu();
    let (heads, dim) = (full.heads, full.dim);
    let busy = EACH * gpu.driver().processors() as usize;
    let splits = busy
        .div_ceil(rows * full.kv_heads)
        .clamp(1, step.context().div_ceil(LEAST));
    let split_tokens = step.context().div_ceil(splits).next_multiple_of(TOKENS);
    let splits = step.context().div_ceil(split_tokens);
    let partial = DeviceRows::new(gpu, rows * heads * splits, dim + 2)?;
    let kernel = by_kv_and_dim!(full, "attention_decode");
    launch(
        gpu,
        kernel,
        [splits, full.kv_heads, rows],
        128,
        &[
            queries.arg(),
            step.blocks(0),
            int(step.shape.table_width),
            step.row_segment(),
            step.positions(),
            partial.arg(),
            int(heads),
            int(full.kv_heads),
            int(layer),
            int(split_tokens),
        ],
    )?;
    launch(
        gpu,
        "attention_combine",
        [rows, heads, 1],
        128,
        &[
            partial.arg(),
            both.arg(),
            out.arg(),
            int(heads),
            int(dim),
            int(splits),
        ],
    )
}

/// Rows of sequences from `first` on, many of each.
fn prefill(
    queries: &DeviceRows,
    both: &DeviceRows,
    out: &DeviceRows,
    full: &FullAttention<'_>,
    layer: usize,
    step: &Step,
    first: usize,
) -> Result<()> {
    let kernel = by_kv_and_dim!(full, "attention_prefill");
    /// Query heads of a tile, over all its rows.
    const TILE: usize = 64;
    launch(
        queries.gpu(),
        kernel,
        [
            (step.longest * (full.heads / full.kv_heads)).div_ceil(TILE),
            full.kv_heads,
            step.shape.segments - first,
        ],
        128,
        &[
            queries.arg(),
            both.arg(),
            step.blocks(first),
            int(step.shape.table_width),
            step.starts(first),
            step.positions(),
            out.arg(),
            int(full.heads),
            int(full.kv_heads),
            int(layer),
        ],
    )
}

/// For each row of `logits`, which are changed, the token that its rule of the step chooses: the bits of the ids in one row, all of
/// them set for none.
pub(crate) fn choose(logits: &DeviceRows, step: &Step) -> Result<DeviceRows> {
    let gpu = logits.gpu();
    let choices = step.shape.choices;
    assert_eq!(choices.rules, logits.count(), "a rule for each row");
    let allowed = choices.allowed.min(logits.width());
    let args = [
        logits.arg(),
        int(logits.width()),
        step.edits(),
        int(choices.edits),
        int(logits.count()),
        int(allowed),
    ];
    let blocks = choices.edits.div_ceil(BLOCK as usize);
    launch(gpu, "edit_logits", [blocks, 1, 1], BLOCK, &args)?;
    let found = DeviceRows::new(gpu, 1, logits.count())?;
    let args = [
        logits.arg(),
        int(logits.width()),
        int(allowed),
        step.picks(),
        step.masks(),
        int(choices.mask_words()),
        found.arg(),
    ];
    launch(gpu, "choose", [logits.count(), 1, 1], 1024, &args)?;
    Ok(found)
}
