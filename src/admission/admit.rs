//! Admission: it admits requests to a gate, and counts the refusals.

use std::{ops::Deref, sync::Arc};

use super::{
    core::Core,
    gate::{Gate, Target},
    kept::keep,
    permit::{Reading, Unanswered},
    shard::Refused,
};
use crate::sync::Ordering;

/// How many refusals may read the bodies of their requests at the same time.
const READERS: usize = 128;

/// Admits requests to a gate. A plain pointer: a clone is a copy and owns nothing. The target also
/// tells whether the requests are for a probe, because a service has no room for more than a
/// pointer.
pub(crate) struct Admission<K: 'static, T: 'static>(&'static Target<K, T>);

impl<K, T> Admission<K, T> {
    /// Whether this admission is for services that only lead to a probe.
    pub(crate) fn leads_to_probe(self) -> bool {
        self.0.to_probe.is_none()
    }

    /// The admission of the same gate for services that only lead to a probe.
    pub(crate) fn to_probe(self) -> Self {
        self.0.to_probe.map_or(self, Admission)
    }

    /// Admits a request on the fast path: see [`Shard::admit`].
    #[inline]
    pub(crate) fn admit(self) -> Option<Unanswered<T>> {
        let shard = self.0.core.shard();
        shard.admit().then(|| Unanswered(shard))
    }

    /// Admits a request that [`admit`](Self::admit) did not, or returns the reason for the refusal.
    pub(crate) fn admit_slow(self) -> Result<Unanswered<T>, Refused> {
        let shard = self.0.core.shard();
        shard.admit_slow()?;
        Ok(Unanswered(shard))
    }

    /// Allows a refusal to read the body of its request, unless too many refusals are reading
    /// already.
    pub(crate) fn begin_reading(self) -> Option<Reading<T>> {
        let shard = self.0.core.shard();
        let one_more = |readers| (readers < READERS).then_some(readers + 1);
        // `Relaxed`: the counter limits a number and publishes nothing.
        let begun =
            shard
                .common()
                .readers
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        begun.is_ok().then(|| Reading(shard))
    }
}

impl<K, T> Deref for Admission<K, T> {
    type Target = Core<K, T>;

    #[inline]
    fn deref(&self) -> &Core<K, T> {
        &self.0.core
    }
}

impl<K, T> Clone for Admission<K, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K, T> Copy for Admission<K, T> {}

impl<K, T> Gate<K, T> {
    /// The first call keeps the shards until the process ends. See "Ownership" in the module
    /// header.
    pub(crate) fn admission(&self) -> Admission<K, T>
    where
        K: Send + Sync,
        T: Send + Sync,
    {
        Admission(self.target.get_or_init(|| {
            let target = |to_probe| {
                keep(Target {
                    core: Arc::clone(&self.core),
                    to_probe,
                })
            };
            target(Some(target(None)))
        }))
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::{super::kept::is_kept, *};

    struct Owner(Gate<(), Owner>);

    impl Deref for Owner {
        type Target = Gate<(), Owner>;

        fn deref(&self) -> &Self::Target {
            &self.0
        }
    }

    fn gate() -> Arc<Owner> {
        Arc::new_cyclic(|owner| Owner(Gate::new(None, false, (), owner)))
    }

    #[test]
    fn a_piece_counts_until_its_server_drops_it() {
        let gate = gate();
        let permit = gate.admission().admit().unwrap().answered();
        let pieces = [(); 2].map(|()| permit.piece());
        drop(permit);
        assert_eq!(gate.pieces(), 2);
        assert_eq!(gate.word().count(), 0);
        drop(pieces);
        assert_eq!(gate.pieces(), 0);
    }

    #[test]
    fn the_number_of_refusals_that_read_a_body_is_limited() {
        let gate = gate();
        let admission = gate.admission();
        let mut readings: Vec<_> = (0..READERS)
            .map(|_| admission.begin_reading().unwrap())
            .collect();
        assert!(admission.begin_reading().is_none());
        readings.pop();
        readings.push(admission.begin_reading().unwrap());
        assert!(admission.begin_reading().is_none());
    }

    #[test]
    fn an_admission_leads_to_the_gate_while_the_gate_has_an_owner() {
        let gate = gate();
        let admission = gate.admission();
        let request = admission.admit().unwrap();
        assert!(admission.owner().is_some() && request.owner().is_some());
        drop(gate);
        assert!(admission.owner().is_none() && request.owner().is_none());
    }

    #[test]
    fn the_static_list_contains_everything_that_an_admission_points_at() {
        let gate = gate();
        let admission = gate.admission();
        assert!(is_kept(admission.0));
        assert!(admission.0.to_probe.is_some_and(is_kept));
        assert_eq!(gate.address(), admission.address());
        assert!(admission.to_probe().leads_to_probe() && !admission.leads_to_probe());
    }

    #[test]
    fn one_admission_is_made_on_first_use() {
        let gate = gate();
        let core = Arc::downgrade(&gate.0.core);
        drop(gate);
        assert!(core.upgrade().is_none(), "it is kept without an admission");
        let gate = self::gate();
        assert!(std::ptr::eq(gate.admission().0, gate.admission().0));
        let core = Arc::downgrade(&gate.0.core);
        drop(gate);
        assert!(core.upgrade().is_some());
    }
}
