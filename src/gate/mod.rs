//! Admission and counting: who is let in, how many are inside, and who is told when the last one
//! has left.
//!
//! Every atomic `Ordering` of the crate is in this folder, and this is the argument for them.
//!
//! # The word
//!
//! One machine word holds everything that admission depends on: the phase in its top three bits,
//! a flag under them ("named"), the number of requests in flight, and at the bottom two flags that
//! admission does not depend on ("not ready" and "has served"). So the more there is to it, the
//! larger the word: "draining or later", "no longer just serving, or requests are to be known by
//! name", and "that, or as many as the limit are in flight" are each one comparison of the whole
//! word with a constant, and the last of them is all that an admission in Serving asks.
//!
//! A separate phase and counter cannot work: a request that reads "serving", is delayed, and then
//! adds itself to a count which the drain has just read as zero is let in and lost. With one word
//! the two are the same write.
//!
//! # The protocol
//!
//! - **admit** is a compare-and-swap from a word that is before draining and below the limit to
//!   the same word plus one, with "has served" set. It is written twice: as short as it can be for
//!   the phase that lasts for months, and in full for the rest.
//! - **advance** is a compare-and-swap to a later phase; the count is carried over.
//! - **release** is a subtraction of one. Whoever brings the count to zero in a word that is
//!   draining or later is the *last one out*, locks the waiter's slot, takes the waker, and wakes
//!   it after unlocking.
//! - **wait** locks the waiter's slot, loads the word, and either finds it idle (draining or
//!   later, count zero) or leaves its waker in the slot, all under that one lock.
//!
//! There is one waiter, the driver of the timeline. Everybody else waits for the phase, which the
//! driver publishes.
//!
//! # Why it is right
//!
//! 1. *Nobody is let in once draining has begun.* All changes of the word are read-modify-writes,
//!    so they have a single order. An admission after the advance sees the phase the advance
//!    wrote, and refuses without writing; an admission before it is in the count the advance
//!    carried over. Hence in a draining word the count only falls, "idle" once true stays true,
//!    and exactly one release sees itself as the last. This needs atomicity alone: an admission
//!    is `Relaxed`.
//! 2. *The limit is exact.* The comparison with the limit and the addition are one
//!    compare-and-swap, so the count never passes the limit, not even for an instant, and nobody
//!    is refused while there is room.
//! 3. *What a request did happens before what follows the drain.* A release is `Release`; the
//!    wait's load is `Acquire`. Every other change of the word is a read-modify-write and so
//!    continues the release sequence of each release before it: a load that sees zero
//!    synchronises with all of them, not just with the last.
//! 4. *The wake-up is not lost.* The waiter checks and registers in one critical section. If that
//!    section comes before the last one out locks the slot, the waker is there and is woken. If
//!    it comes after, the unlock and the lock order the subtraction before the load, which
//!    therefore sees zero. There is no third case.
//! 5. *Reading the phase for a response header or for readiness is `Relaxed`.* Nothing else is
//!    published through it; a thread that was told of a phase in any synchronising way reads that
//!    phase or a later one, because a single variable is coherent.
//!
//! 6. *Who is told that a phase has come sees what came before it.* The timeline advances the word
//!    after it has done what the phase promises; the advance is `Release`, and whoever acts upon a
//!    phase, rather than put it into a header, reads it with `Acquire`.
//!
//! `models` holds these as loom models: every interleaving, and every reordering the orderings
//! leave open, of this code and not of a copy of it.

mod core;
mod handle;
#[cfg(all(test, tower_graceful_loom))]
mod models;
mod word;

pub(crate) use self::{
    core::Refused,
    handle::{Gate, Ticket, WeakGate},
};
