//! Experts on a device that chooses among them itself: nothing of a step of few rows waits for the host.

use super::matrix::{DeviceMatrix, Numerals, blocks, gemv};
use super::{BLOCK, DeviceRows, graphs, int, launch};
use crate::gpu::{Arg, Buffer, Gpu, GpuError, Scratch};

type Result<T> = std::result::Result<T, GpuError>;

/// Rows of a step that `experts.cu` has room for.
pub(crate) const MOST_ROWS: usize = 64;
/// Experts, and how many of them a row may go to.
const MOST_EXPERTS: usize = 512;
const MOST_CHOSEN: usize = 16;

/// Rows that a product takes at once, of those that go to one expert. A single row goes to each of its experts alone.
const TOGETHER: usize = 4;

// steps that are recorded do without the host
const _: () = assert!(graphs::MOST_ROWS <= MOST_ROWS);

/// Whether the device can choose `chosen` of `experts` experts.
pub(crate) fn can_route(experts: usize, chosen: usize) -> bool {
    experts <= MOST_EXPERTS && chosen <= MOST_CHOSEN.min(experts)
}

/// Which experts the rows of a step go to. A visit is a row at one of its experts, and a row's visits follow each other.
#[derive(Debug)]
pub(crate) struct Route {
    /// (rows, chosen).
    weights: DeviceRows,
    /// Visits, sorted by expert.
    visits: Scratch,
    /// Parts of that: an expert, and up to `together` visits to it.
    groups: Scratch,
    /// How many of them there can be.
    group_count: usize,
    together: usize,
}

impl Route {
    /// Of the router's logits, (t, experts): each row goes to the likeliest `chosen`. `normed`: their weights sum up to 1.
    pub(crate) fn new(logits: &DeviceRows, chosen: usize, normed: bool) -> Result<Self> {
        let (gpu, rows, experts) = (logits.gpu(), logits.count(), logits.width());
        assert!(rows <= MOST_ROWS && can_route(experts, chosen), "see them");
        let all = rows * chosen;
        let together = if rows == 1 { 1 } else { TOGETHER };
        // of each expert that is gone to, all groups but one are full
        let group_count = (all + (together - 1) * experts.min(all)) / together;
        let route = Self {
            weights: DeviceRows::new(gpu, rows, chosen)?,
            visits: gpu.scratch(all * size_of::<i32>())?,
            groups: gpu.scratch(group_count * size_of::<[i32; 4]>())?,
            group_count,
            together,
        };
        let args = [
            logits.arg(),
            int(rows),
            int(experts),
            int(chosen),
            int(usize::from(normed)),
            int(together),
            route.weights.arg(),
            Arg::Address(route.visits.address()),
            Arg::Address(route.groups.address()),
            int(group_count),
        ];
        // a warp a row, and at least a thread an expert
        let threads = experts.next_multiple_of(32).max(32 * rows.min(16));
        launch(gpu, "route", [1, 1, 1], threads as u32, &args)?;
        Ok(route)
    }

    /// How many experts a row goes to.
    fn chosen(&self) -> usize {
        self.weights.width()
    }

    /// All visits.
    fn visits(&self) -> usize {
        self.weights.count() * self.chosen()
    }

    /// Row by row `shared ← shared · sigmoid(gate) + Σ weight · product`, over products of the visits; `gates` is (t, 1).
    pub(crate) fn combine(
        &self,
        shared: &DeviceRows,
        gates: &DeviceRows,
        products: &DeviceRows,
    ) -> Result<()> {
        let width = shared.width();
        let args = [
            shared.arg(),
            gates.arg(),
            products.arg(),
            self.weights.arg(),
            int(width),
            int(self.chosen()),
        ];
        let grid = [shared.count(), width.div_ceil(BLOCK as usize), 1];
        launch(shared.gpu(), "combine", grid, BLOCK, &args)
    }
}

/// What the rows of a product are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meets {
    /// Those of the step: each is multiplied with the matrices of all experts it goes to.
    Rows,
    /// A row a visit.
    Visits,
}

/// A matrix of each expert, or several of the same shape.
#[derive(Debug)]
pub(crate) struct ExpertMatrices {
    /// The matrices, so that they stay where the tables say: part by part, of each expert.
    matrices: Vec<DeviceMatrix>,
    /// For each format the addresses of all matrices, null for those of another.
    tables: Vec<(Numerals, Buffer)>,
    experts: usize,
}

impl ExpertMatrices {
    /// Of `parts`, each with a matrix an expert.
    pub(crate) fn new(gpu: &Gpu, parts: &[Vec<DeviceMatrix>]) -> Result<Self> {
        let matrices = parts.concat();
        let mut formats: Vec<Numerals> = Vec::new();
        for matrix in &matrices {
            assert_eq!(
                (matrix.rows(), matrix.width()),
                (matrices[0].rows(), matrices[0].width()),
                "experts are of one shape"
            );
            if !formats.contains(&matrix.numerals()) {
                formats.push(matrix.numerals());
            }
        }
        let table = |format: Numerals| {
            let addresses: Vec<u64> = matrices
                .iter()
                .map(|matrix| match matrix.numerals() {
                    numerals if numerals == format => matrix.address(),
                    _ => 0,
                })
                .collect();
            Ok((format, gpu.buffer_of(&addresses)?))
        };
        Ok(Self {
            tables: formats.into_iter().map(table).collect::<Result<_>>()?,
            experts: parts.first().map_or(0, Vec::len),
            matrices,
        })
    }

    /// `x · Wᵀ` for the experts that `route` has chosen: part by part, a row a visit.
    pub(crate) fn multiply(
        &self,
        x: &DeviceRows,
        meets: Meets,
        route: &Route,
    ) -> Result<DeviceRows> {
        let (gpu, visits) = (x.gpu(), route.visits());
        let (rows, width) = (self.matrices[0].rows(), self.matrices[0].width());
        let share = match meets {
            Meets::Rows => route.chosen(),
            Meets::Visits => 1,
        };
        assert_eq!(
            (x.count() * share, x.width()),
            (visits, width),
            "a visit meets weights of its width"
        );
        let parts = self.matrices.len() / self.experts;
        let y = DeviceRows::new(gpu, parts * visits, rows)?;
        let beside = parts * route.group_count;
        let grid = [
            blocks(rows, route.together, beside, gpu),
            route.group_count,
            parts,
        ];
        for (numerals, table) in &self.tables {
            let args = [
                Arg::Address(table.address()),
                x.arg(),
                y.arg(),
                int(rows),
                int(width),
                Arg::Address(route.groups.address()),
                Arg::Address(route.visits.address()),
                int(visits),
                int(share),
                int(self.experts),
            ];
            launch(gpu, gemv(*numerals, route.together), grid, BLOCK, &args)?;
        }
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulated::emulated_gpu;
    use crate::kernels::testing::numbers;
    use crate::quant::Format;

    /// Numbers that every format here has exactly.
    fn eighths(seed: u64, count: usize) -> Vec<f32> {
        let numbers = numbers(seed, count).into_iter();
        numbers.map(|x| (x * 8.0).round() / 8.0).collect()
    }

    #[test]
    fn rows_meet_the_experts_they_go_to_whatever_those_are_held_in_and_whoever_else_goes_there() {
        const EXPERTS: usize = 7;
        const CHOSEN: usize = 3;
        let Some(gpu) = emulated_gpu() else { return };
        let (n, k) = (20, 36);
        let formats = [Format::F32, Format::Bf16, Format::F16];
        let numbers_of: Vec<Vec<f32>> = (0..2 * EXPERTS as u64)
            .map(|seed| eighths(seed, n * k))
            .collect();
        let matrices = numbers_of.iter().enumerate().map(|(at, numbers)| {
            let rows = |row: usize, out: &mut [f32]| out.copy_from_slice(&numbers[row * k..][..k]);
            let made = DeviceMatrix::from_rows(&gpu, formats[at % 3], (n, k), &rows, |_| {});
            made.unwrap().expect("every number fits")
        });
        let matrices: Vec<DeviceMatrix> = matrices.collect();
        let (first, second) = matrices.split_at(EXPERTS);
        let experts = ExpertMatrices::new(&gpu, &[first.to_vec(), second.to_vec()]).unwrap();
        assert_eq!(experts.tables.len(), 3, "a table a format");
        for rows in [1, 2, 5, MOST_ROWS] {
            let logits = numbers(40, rows * EXPERTS);
            let mut x = eighths(41, rows * k);
            let mut before = None;
            for others in [1.0, 0.5] {
                x[k..].iter_mut().for_each(|x| *x *= others);
                let logits_at = DeviceRows::of(&gpu, &logits, EXPERTS).unwrap();
                let route = Route::new(&logits_at, CHOSEN, true).unwrap();
                let x_at = DeviceRows::of(&gpu, &x, k).unwrap();
                let found = experts.multiply(&x_at, Meets::Rows, &route).unwrap();
                let found = found.numbers().unwrap();
                for part in 0..2 {
                    for visit in 0..rows * CHOSEN {
                        let (row, choice) = (visit / CHOSEN, visit % CHOSEN);
                        let logits = &logits[row * EXPERTS..][..EXPERTS];
                        let mut order: Vec<usize> = (0..EXPERTS).collect();
                        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
                        let w = &numbers_of[part * EXPERTS + order[choice]];
                        let x = &x[row * k..][..k];
                        let found = &found[(part * rows * CHOSEN + visit) * n..][..n];
                        for (found, w) in found.iter().zip(w.chunks_exact(k)) {
                            let products = x.iter().zip(w).map(|(x, w)| f64::from(x * w));
                            let expected: f64 = products.sum();
                            assert!((f64::from(*found) - expected).abs() < 1e-5, "{rows} rows");
                        }
                    }
                }
                let own = found[..CHOSEN * n].to_vec();
                assert_eq!(*before.get_or_insert(own.clone()), own, "{rows} rows");
            }
        }
    }
}
