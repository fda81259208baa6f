//! Eight numbers at once: what kernels are written in where the compiler would not find the vectors by itself.
#![allow(unsafe_code)]

/// Numbers in a vector.
pub(crate) const LANES: usize = 8;

/// A vector of f32 of some kind of processor. Each operation is one instruction there, once it is inlined into a function
/// compiled for that processor, as [`with_vectors`] does.
pub(crate) trait Vector: Copy {
    fn splat(x: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self · b + c`.
    fn mul_add(self, b: Self, c: Self) -> Self;

    /// The sum of the eight.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut all = [0.0; LANES];
        self.store(&mut all);
        let [a, b, c, d, e, f, g, h] = all;
        ((a + e) + (b + f)) + ((c + g) + (d + h))
    }
}

/// Any processor: the compiler may still find vectors of four.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn each(self, other: Self, operation: impl Fn(f32, f32) -> f32) -> Self {
        let mut all = self.0;
        for (x, y) in all.iter_mut().zip(other.0) {
            *x = operation(*x, y);
        }
        Self(all)
    }
}

impl Vector for Portable {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(*from)
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.each(other, |x, y| x + y)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.each(other, |x, y| x - y)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.each(other, |x, y| x * y)
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        self.mul(b).add(c)
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{LANES, Vector};
    use std::arch::x86_64::*;

    /// Processors with AVX2 and FMA. [`with_vectors`](super::with_vectors) alone names it, where they are.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256);

    impl Vector for Avx2 {
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: the processor has AVX2, see `Avx2`
            Self(unsafe { _mm256_set1_ps(x) })
        }

        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            // SAFETY: as above; there are eight numbers
            Self(unsafe { _mm256_loadu_ps(from.as_ptr()) })
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            // SAFETY: as above; there is room for eight numbers
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: the processor has AVX2, see `Avx2`
            Self(unsafe { _mm256_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: as above
            Self(unsafe { _mm256_sub_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: as above
            Self(unsafe { _mm256_mul_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: the processor has FMA, see `Avx2`
            Self(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
        }
    }
}

/// Calls a kernel with the [`Vector`] of this processor as its type, compiled for it.
macro_rules! with_vectors {
    ($kernel:ident ( $($argument:expr),* $(,)? )) => {{
        #[cfg(target_arch = "x86_64")]
        let fast = $crate::kernels::has_avx2();
        #[cfg(not(target_arch = "x86_64"))]
        let fast = false;
        if fast {
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::vectorised(
                #[inline(always)]
                || $kernel::<$crate::kernels::vector::Avx2>($($argument),*),
            )
        } else {
            $kernel::<$crate::kernels::vector::Portable>($($argument),*)
        }
    }};
}
pub(crate) use with_vectors;

#[cfg(test)]
mod tests {
    use super::*;

    fn every_operation<V: Vector>() -> ([f32; LANES], f32) {
        let a = V::load(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        let b = V::splat(0.5);
        let mut out = [0.0; LANES];
        a.mul_add(b, a.sub(b)).mul(b).add(a).store(&mut out);
        (out, a.sum())
    }

    #[test]
    fn all_processors_compute_the_same() {
        let expected = std::array::from_fn(|i| {
            let x = (i + 1) as f32;
            (x * 0.5 + (x - 0.5)) * 0.5 + x
        });
        assert_eq!(every_operation::<Portable>(), (expected, 36.0));
        assert_eq!(with_vectors!(every_operation()), (expected, 36.0));
    }
}
