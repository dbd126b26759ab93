//! What a request or a refusal holds while the gate counts it: each type gives back its count when it
//! is dropped.

use std::{mem, sync::Arc};

use super::{shard::Shard, word::Word};
use crate::sync::Ordering;

/// A permit of a request that has no response yet. Dropping it releases the request, and counts it
/// as dropped during a stop.
#[must_use = "dropping it releases the request at once"]
pub(crate) struct Unanswered<T: 'static>(pub(super) &'static Shard<T>);

impl<T> Unanswered<T> {
    /// The request has a response, or its service has failed.
    #[inline]
    pub(crate) fn answered(self) -> Permit<T> {
        let permit = Permit(self.0);
        // From here on the permit releases the request.
        mem::forget(self);
        permit
    }

    /// The word of this request's shard: the phase, and the number of requests on the shard.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        self.0.word()
    }

    /// Whether clients are asked to leave one after another. Takes no lock.
    pub(crate) fn spreads_leaving(&self) -> bool {
        self.0.common().spreads_leaving.load(Ordering::Relaxed)
    }

    /// The owner of the gate, if it is still alive.
    pub(crate) fn owner(&self) -> Option<Arc<T>> {
        self.0.common().owner()
    }
}

impl<T> Drop for Unanswered<T> {
    fn drop(&mut self) {
        self.0.release_unanswered();
    }
}

/// A permit of a request that has a response. Dropping it releases the request.
#[must_use = "dropping the permit releases the request at once"]
pub(crate) struct Permit<T: 'static>(&'static Shard<T>);

impl<T> Permit<T> {
    /// The word of this request's shard: the phase, and the number of requests on the shard.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        self.0.word()
    }

    /// The body of the response has failed, so the response cannot be completed. Releases the
    /// request, and counts it as dropped if the service stops.
    #[cold]
    #[inline(never)]
    pub(crate) fn fail(self) {
        let request = Unanswered(self.0);
        mem::forget(self);
        drop(request);
    }

    /// Counts a piece of the response that is passed to the server.
    pub(crate) fn piece(&self) -> Piece<T> {
        let shard = self.0;
        shard.common().pieces.fetch_add(1, Ordering::Relaxed);
        Piece(shard)
    }
}

/// A piece of a response that the server holds. Dropping it means that the server no longer holds
/// it. It does not keep the request in flight, because other middleware may keep parts of a
/// response for any time. `Relaxed`: this is a statistic that is read much later.
#[must_use = "dropping it means that the server has sent the piece"]
pub(crate) struct Piece<T: 'static>(&'static Shard<T>);

impl<T> Drop for Piece<T> {
    fn drop(&mut self) {
        self.0.common().pieces.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<T> Drop for Permit<T> {
    #[inline]
    fn drop(&mut self) {
        self.0.release();
    }
}

/// Permission to read the body of a refused request. Dropping it allows another refusal to read.
#[must_use = "dropping it allows another refusal to read"]
pub(crate) struct Reading<T: 'static>(pub(super) &'static Shard<T>);

impl<T> Drop for Reading<T> {
    fn drop(&mut self) {
        // `Relaxed`: the counter limits a number and publishes nothing.
        self.0.common().readers.fetch_sub(1, Ordering::Relaxed);
    }
}
