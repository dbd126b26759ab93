//! Admission and counting: who is let in, how many are inside, and who is told when the last one
//! has left.
//!
//! The atomic `Ordering`s of every request are in this folder, and this is the argument for them.
//!
//! # The word
//!
//! One machine word holds everything that an admission depends on: the phase in its top three bits,
//! a flag under them ("named"), the number of requests in flight, and at the bottom three flags that
//! admission does not depend on ("not ready", "has served" and "has admitted"). So the more there is to it, the
//! larger the word: "draining or later", "no longer just serving, or requests are to be known by
//! name", and "that, or as many as the limit are in flight" are each one comparison of the whole
//! word with a constant, and the last of them is all that an admission in Serving asks.
//!
//! A separate phase and counter cannot work: a request that reads "serving", is delayed, and then
//! adds itself to a count which the drain has just read as zero is let in and lost. With one word
//! the two are the same write.
//!
//! # The lanes
//!
//! A word that all threads change is a cache line that moves from core to core with every request.
//! So there are several, a *lane* for each few threads, on cache lines of their own. A request is
//! let in on the lane of the thread that calls, and let out on that same lane, wherever its body
//! ends. Each word has the whole phase, so what is argued of one word holds for each of them; the
//! count is the sum. Where there is a limit only one lane is used, because a limit that is exact
//! needs one count.
//!
//! # The protocol
//!
//! - **admit** is a compare-and-swap from a word that is before draining and below the limit to
//!   the same word plus one, with "has served" and "has admitted" set. It is written twice: as short as it can be for
//!   the phase that lasts for months, and in full for the rest.
//! - **advance** is a compare-and-swap to a later phase on one lane after another, the first lane
//!   last; the counts are carried over. The phase of the gate is that of the first lane.
//! - **release** is a subtraction of one. Whoever brings the count to zero in a word that is
//!   draining or later is the *last one out* of its lane, locks the waiter's slot, takes the waker,
//!   and wakes it after unlocking.
//!   A request that has had no response is counted as dropped on the way out, if the service stops.
//! - **wait** locks the waiter's slot, loads the words, and either finds all of them idle (draining
//!   or later, count zero) or leaves its waker in the slot, all under that one lock.
//!
//! There is one waiter, the driver of the timeline. Everybody else waits for the phase, which the
//! driver publishes.
//!
//! # Why it is right
//!
//! 1. *Nobody is let in once draining has begun.* All changes of a word are read-modify-writes,
//!    so they have a single order. An admission after the advance sees the phase the advance
//!    wrote, and refuses without writing; an admission before it is in the count the advance
//!    carried over. Hence in a draining word the count only falls, "idle" once true stays true,
//!    and exactly one release sees itself as the last. This needs atomicity alone: an admission
//!    is `Relaxed`.
//! 2. *The limit is exact.* The comparison with the limit and the addition are one
//!    compare-and-swap of the one lane there is then, so the count never passes the limit, not even
//!    for an instant, and nobody is refused while there is room.
//! 3. *What a request did happens before what follows the drain.* A release is `Release`; the
//!    wait's load is `Acquire`. Every other change of the word is a read-modify-write and so
//!    continues the release sequence of each release before it: a load that sees zero
//!    synchronises with all of them, not just with the last.
//! 4. *The wake-up is not lost.* The waiter checks and registers in one critical section. If that
//!    section comes before the last one out of a lane locks the slot, the waker is there and is
//!    woken. If it comes after, the unlock and the lock order the subtraction before the load, which
//!    therefore sees zero. There is no third case, and it holds for each lane: a waiter that found
//!    one of them not idle is woken by the last one out of that one, and looks again.
//! 5. *Reading the phase for a response header or for readiness is `Relaxed`.* Nothing else is
//!    published through it; a thread that was told of a phase in any synchronising way reads that
//!    phase or a later one on any lane, because each is coherent, and point 7.
//! 6. *Who is told that a phase has come sees what came before it.* The timeline advances the words
//!    after it has done what the phase promises; the advance is `Release`, and whoever acts upon a
//!    phase, rather than put it into a header, reads it with `Acquire`.
//! 7. *When the gate has a phase, every lane has it.* One advances at a time (the timeline, under
//!    its lock), and the first lane comes last, so whoever has the phase from there, with `Acquire`,
//!    sees it on all lanes. The other way round a request may find its lane in a phase before it
//!    finds the gate in it: it is refused, or asked to leave, as it would be just after, and whatever
//!    is decided for it after that goes by the later of the two.
//! 8. *The count is exact when it matters.* The words are read one after another, so while requests
//!    come and go on several lanes the sum is not of one moment. In a draining word the count only
//!    falls, and with a limit there is one word.
//!
//! `models` holds these as loom models of this code and not of a copy of it: every reordering the
//! orderings leave open, and every interleaving, but where there are three threads those with at most
//! three preemptions.
//!
//! # Who owns what
//!
//! Counting a reference changes a shared word twice more for each request, and twice again for the
//! clone of the service that servers make for each. So neither a request nor a service owns anything:
//! a [`Permit`] points at its lane and a [`Admission`] at the lanes. Both are `'static` references, so what
//! they point at is kept until the process ends, from the moment the first door of a gate is asked
//! for. That is when the layer makes its first service. A gate without a door is given back with its
//! last owner.
//!
//! The price is two kilobytes and the rules, which may hold what the user's rejection has captured, for
//! each lifecycle whose layer has made a service. A process makes one. A static list (`kept`) leads to
//! all of it, so that leak checkers find nothing lost.
//!
//! What is behind the gate has owners as usual, the clones of [`Gate`]: handles, layers, whatever
//! waits or serves. When the last of them is gone, nobody is left who could move the phase on, so to
//! a request, which comes here by its door, it makes no difference.

mod core;
mod kept;
#[cfg(all(test, tower_graceful_loom))]
mod models;
mod permit;
mod shard;
mod thread_index;
mod word;

pub(crate) use self::{
    core::SinceServing,
    permit::{Admission, Gate, Permit, Piece, Reading, Unanswered, WeakGate},
    shard::Refused,
    thread_index::here,
};
