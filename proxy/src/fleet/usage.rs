//! Who uses a model right now, so that it is not taken away from under them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// Counts the requests that use a model. One per model, for the life of the process.
#[derive(Debug, Default)]
pub(crate) struct ModelUse {
    active: AtomicUsize,
    /// It is being evicted: new requests have to wait for a new load.
    leaving: AtomicBool,
}

impl ModelUse {
    /// Begins a use, unless the model is on its way out.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<UseGuard> {
        self.active.fetch_add(1, SeqCst);
        let guard = UseGuard(self.clone());
        (!self.leaving.load(SeqCst)).then_some(guard)
    }

    /// Marks the model as leaving if nobody uses it. Between the two sides' checks nobody slips through:
    /// each first says what it does and then looks at the other.
    pub(crate) fn try_leave(&self) -> bool {
        self.leaving.store(true, SeqCst);
        let free = self.active.load(SeqCst) == 0;
        if !free {
            self.leaving.store(false, SeqCst);
        }
        free
    }

    /// The eviction is over, well or not.
    pub(crate) fn stay(&self) {
        self.leaving.store(false, SeqCst);
    }

    pub(crate) fn active(&self) -> usize {
        self.active.load(SeqCst)
    }
}

/// A use of a model; ends when dropped.
#[derive(Debug)]
pub(crate) struct UseGuard(Arc<ModelUse>);

impl Drop for UseGuard {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_in_use_does_not_leave_and_a_leaving_one_is_not_entered() {
        let usage = Arc::new(ModelUse::default());
        let guard = usage.enter().expect("free to use");
        assert!(!usage.try_leave(), "in use");
        drop(guard);
        assert!(usage.try_leave());
        assert!(usage.enter().is_none(), "leaving");
        assert_eq!(usage.active(), 0, "a refused entry leaves no count behind");
        usage.stay();
        assert!(usage.enter().is_some());
    }
}
