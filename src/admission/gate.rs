//! The gate: it owns the core with all shards, and belongs to an owner that the core leads to.

use std::{
    ops::Deref,
    sync::{Arc, OnceLock, Weak},
};

use super::core::Core;
use crate::sync::lock;

/// A gate with its rules `K`. It is a part of its owner, a `T`.
pub(crate) struct Gate<K: 'static, T: 'static> {
    pub(super) core: Arc<Core<K, T>>,
    /// Set by the first call of `Gate::admission`. From then on the core is kept until the
    /// process ends.
    pub(super) target: OnceLock<&'static Target<K, T>>,
}

/// What an `Admission` points at.
pub(super) struct Target<K: 'static, T: 'static> {
    pub(super) core: Arc<Core<K, T>>,
    /// The target for services that only lead to a probe. `None` on that target itself.
    pub(super) to_probe: Option<&'static Self>,
}

impl<K, T> Drop for Gate<K, T> {
    fn drop(&mut self) {
        // The core holds a weak reference and may be kept until the process ends. Without this line
        // it would keep the memory of the owner as well.
        *lock!(self.core.common().owner) = Weak::new();
    }
}

impl<K, T> Gate<K, T> {
    /// `named`: every admission takes the slow path.
    pub(crate) fn new(limit: Option<usize>, named: bool, rules: K, owner: &Weak<T>) -> Self {
        let core = Core::new(limit, named, rules);
        lock!(core.common().owner).clone_from(owner);
        Self {
            core: Arc::new(core),
            target: OnceLock::new(),
        }
    }
}

impl<K, T> Deref for Gate<K, T> {
    type Target = Core<K, T>;

    fn deref(&self) -> &Core<K, T> {
        &self.core
    }
}
