//! Admission: it admits requests to a gate, and counts the refusals.

use std::{ptr, sync::Arc};

use super::{
    core::Core,
    gate::{Gate, GateInner, Target},
    kept::keep,
    permit::{Reading, Unanswered},
    shard::Refused,
    word::Word,
};
use crate::phase::Phase;

/// Admits requests to a gate. A plain pointer: a clone is a copy and owns nothing. The target also
/// tells whether the requests are for a probe, because a service has no room for more than a
/// pointer.
pub(crate) struct Admission<K: 'static, T: 'static>(&'static Target<K, T>);

impl<K, T> Admission<K, T> {
    #[inline]
    fn core(self) -> &'static Core<K, GateInner<K, T>> {
        &self.0.core
    }

    /// Whether this admission is for services that only lead to a probe.
    pub(crate) fn leads_to_probe(self) -> bool {
        self.0.to_probe.is_none()
    }

    /// The admission of the same gate for services that only lead to a probe.
    pub(crate) fn to_probe(self) -> Self {
        self.0.to_probe.map_or(self, Admission)
    }

    /// Distinguishes the admissions of one gate from those of others.
    pub(crate) fn address(self) -> usize {
        ptr::from_ref(self.core()).addr()
    }

    /// Admits a request on the fast path: see [`Shard::admit`].
    #[inline]
    pub(crate) fn admit(self) -> Option<Unanswered<K, T>> {
        let shard = self.core().shard();
        shard.admit().then(|| Unanswered(shard))
    }

    /// Admits a request that [`admit`](Self::admit) did not, or returns the reason for the refusal.
    pub(crate) fn admit_slow(self) -> Result<Unanswered<K, T>, Refused> {
        let shard = self.core().shard();
        shard.admit_slow()?;
        Ok(Unanswered(shard))
    }

    /// Counts a refusal. Exempt requests that are not admitted must not be counted here.
    pub(crate) fn refused(self, refused: Refused) {
        self.core().refused(refused);
    }

    /// Allows a refusal to read the body of its request, unless too many refusals are reading
    /// already.
    pub(crate) fn begin_reading(self) -> Option<Reading<K, T>> {
        let core = self.core();
        core.begin_reading().then(|| Reading(core))
    }

    /// The rules of the gate.
    pub(crate) fn rules(self) -> &'static K {
        &self.core().common().rules
    }

    pub(crate) fn word(self) -> Word {
        self.core().word()
    }

    pub(crate) fn phase(self) -> Phase {
        self.core().phase()
    }

    /// The gate, if it still has an owner.
    pub(crate) fn gate(self) -> Option<Gate<K, T>> {
        self.core().common().owned().map(Gate)
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
        Admission(self.0.target.get_or_init(|| {
            let target = |to_probe| {
                keep(Target {
                    core: Arc::clone(&self.0.core),
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

    fn gate() -> Gate<(), ()> {
        Gate::new(None, false, (), |_| ())
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
    fn an_admission_leads_to_the_gate_while_the_gate_has_an_owner() {
        let gate = gate();
        let admission = gate.admission();
        let request = admission.admit().unwrap();
        assert!(admission.gate().is_some() && request.gate().is_some());
        drop(gate);
        assert!(admission.gate().is_none() && request.gate().is_none());
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
        assert!(ptr::eq(gate.admission().0, gate.clone().admission().0));
        let core = Arc::downgrade(&gate.0.core);
        drop(gate);
        assert!(core.upgrade().is_some());
    }
}
