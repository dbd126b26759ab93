//! Admission and counting: this module decides whether a request is admitted, counts the requests
//! in flight, and wakes the drain when the last one has ended.
//!
//! A *gate* ([`Gate`]) is the admission state of one lifecycle. The middleware admits and releases
//! requests here, and the timeline (`shutdown`) advances the phase and waits for the count to reach
//! zero. The atomic `Ordering`s of every request are in this folder, and this page is the argument
//! for them. No ordering here may change without its step of the argument and the loom model that
//! checks it (`models`).
//!
//! # The word
//!
//! One machine word holds everything that an admission depends on: the phase in the top three bits,
//! a flag under them ("named": requests are listed in the request table), and the number of
//! requests in flight. The three lowest bits are flags that no admission depends on ("not ready",
//! "has served" and "has admitted"). This layout makes each question about a word one comparison
//! with a constant: "draining or later", "later than Serving, or named", and "later than Serving,
//! or named, or at the limit". The last of them is the only comparison of an admission in Serving.
//!
//! A separate phase and counter cannot work. A request could read "serving", be delayed, and add
//! itself to a count that the drain has just read as zero; it would be admitted and lost. With one
//! word, the check and the count are the same write.
//!
//! # The shards
//!
//! A word that all threads change is a cache line that moves from core to core with every request.
//! So a gate has several words, called *shards*, each on its own cache lines and used by a few
//! threads. A request is admitted on the shard of the calling thread and released on the same
//! shard, whichever thread its body ends on. Every word contains the whole phase, so an argument
//! about one word holds for each of them. The count is the sum over the shards. A gate with a limit
//! uses one shard only, because an exact limit needs a single count.
//!
//! # The protocol
//!
//! - **admit** is a compare-and-swap from a word that is before draining and below the limit to the
//!   same word plus one, with "has served" and "has admitted" set. There are two versions: `admit`
//!   handles Serving only and is as short as possible; `admit_slow` handles all phases.
//! - **advance** is a compare-and-swap to a later phase on one shard after another, the first shard
//!   last. The counts are carried over. The phase of the gate is the phase of the first shard.
//! - **release** is a subtraction of one. If it brings the count to zero in a word that is draining
//!   or later, it is the *last release* of its shard: it locks the waker slot, takes the waker,
//!   unlocks, and wakes it. A request that is released without a response during a stop is also
//!   counted as dropped.
//! - **wait** locks the waker slot and loads the words. Under that one lock it either finds all of
//!   them idle (draining or later, count zero) or leaves its waker in the slot.
//!
//! One task waits: the driver of the timeline. All other tasks wait for the phase, which the driver
//! publishes.
//!
//! # Why it is right
//!
//! 1. *No request is admitted once draining has begun.* All changes of a word are
//!    read-modify-writes, so they have a single order. An admission after the advance sees the
//!    phase that the advance wrote, and refuses without writing. An admission before the advance is
//!    in the count that the advance carried over. Hence the count of a draining word only falls,
//!    "idle" stays true once it is true, and of the requests in flight on a shard exactly one
//!    release is the last one. This needs atomicity alone, so an admission is `Relaxed`. Models:
//!    `an_admitted_request_is_waited_for`, `an_admitted_request_on_another_shard_is_waited_for`,
//!    `changes_of_the_word_do_not_overwrite_one_another`.
//! 2. *The limit is exact.* The comparison with the limit and the addition are one compare-and-swap
//!    of the only shard in use. So the count never exceeds the limit, not even for an instant, and
//!    no request is refused while there is room. Model: `the_limit_is_exact`.
//! 3. *Everything a request did happens before whatever follows the drain.* A release is `Release`;
//!    its partner is the `Acquire` load of the wait. Every other change of the word is a
//!    read-modify-write and so continues the release sequence of each release before it. A load
//!    that sees zero therefore synchronises with all releases, not only with the last one. Models:
//!    as in point 1, and `a_request_dropped_in_a_stop_is_counted_before_the_drain_sees_it_go`.
//! 4. *No wake-up is lost.* The wait checks the words and registers its waker in one critical
//!    section. If that section comes before the last release of a shard locks the slot, the release
//!    finds the waker and wakes it. If it comes after, the unlock and the lock order the
//!    subtraction before the load, which therefore sees zero. There is no third case. This holds
//!    for each shard: a wait that found a shard not idle is woken by the last release of that
//!    shard, and checks all of them again. Models: `the_last_release_wakes_the_waiter`,
//!    `the_last_release_of_any_shard_wakes_the_waiter`,
//!    `a_wake_up_is_not_lost_between_advance_and_release`.
//! 5. *Reading the phase for a response header or for readiness is `Relaxed`.* Nothing else is
//!    published through it. A thread that learned of a phase through any synchronising operation
//!    reads that phase or a later one on every shard, because each word is coherent and because of
//!    point 7.
//! 6. *Code that acts on a phase sees everything that led to that phase.* The timeline does what a
//!    phase promises and then advances the words. The advance is `Release`; its partner is the
//!    `Acquire` load with which code that acts on a phase reads it. Code that only writes the phase
//!    into a header reads it as in point 5. Model: `everything_before_an_advance_is_seen`.
//! 7. *When the gate has a phase, every shard has it.* Only the timeline advances, under its lock,
//!    and the first shard comes last. So a thread that reads the phase from the first shard with
//!    `Acquire` sees it on all shards. The reverse can differ: a request may find a phase on its
//!    own shard before the gate has that phase. Then the request is refused, or asked to leave, as
//!    it would be a moment later, and later decisions for it use the later of the two phases.
//!    Models: `no_shard_lags_behind_the_gate`, `a_request_refused_by_a_drain_is_counted`.
//! 8. *The count is exact when it matters.* The words are read one after another, so the sum is not
//!    a snapshot of one moment while requests come and go on several shards. In a draining word,
//!    however, the count only falls, and with a limit there is only one word.
//! 9. *No admission is forgotten when the "has admitted" flags are cleared.* For each flag that it
//!    finds set, `clear_admitted` first records in `admitted` that there was an admission, and then
//!    clears the flag, with `Release`. It clears no other flag. `has_ever_admitted` reads the flags
//!    first, with `Acquire`, and then `admitted`. So a read that finds a cleared flag also finds the
//!    record. Models: `an_admission_during_the_clearing_is_not_forgotten`,
//!    `an_admission_before_the_clearing_is_seen_at_each_moment`.
//!
//! The loom models in `models` run this code and not a copy of it. They explore every reordering
//! that the orderings allow and every interleaving. Three models would take minutes that way
//! (`bounded`): they explore the interleavings with at most three preemptions.
//!
//! The models fail if one of the orderings `Release` and `Acquire` of a shard is `Relaxed`, and if
//! an admission stores the new word without a comparison. They fail if the first shard is advanced
//! before the others, if the wait loads the words before it locks the slot, if a dropped request is
//! counted after its release, and if a refusal is counted by the phase of the gate in place of its
//! own reason. And they fail if a flag is cleared that was not found set, if it is cleared before
//! that is recorded, and if the record is read before the flags.
//!
//! # Ownership
//!
//! A reference count would change a shared word twice more for each request, and twice again for
//! the clone of the service that servers make for each request. So neither a request nor a service
//! owns anything: a [`Permit`] points at its shard, and an [`Admission`] points at the core with
//! all shards. Both are `'static` references, so the core is kept until the process ends, from the
//! moment the first [`Admission`] of a gate is made. The layer does that when it makes its first
//! service. A core without an [`Admission`] is freed with its gate.
//!
//! The price is two kilobytes for each lifecycle whose layer has made a service, and the memory of
//! its rules (`K`; in this crate the settings of the builder, with what the user's rejection function
//! has captured). A process usually makes one. A static list (`kept`) leads to all of it, so that leak
//! checkers report nothing.
//!
//! The gate is a part of its *owner* (`T`; in this crate the lifecycle), which handles, layers,
//! waiting tasks and servers share as usual. When the last of them is dropped, the phase can no longer
//! change. Requests reach the core through their [`Admission`], so this makes no difference to them.

mod admit;
mod core;
mod gate;
mod kept;
#[cfg(all(test, tower_graceful_loom))]
mod models;
mod permit;
mod shard;
mod thread_index;
mod word;

pub(crate) use self::{
    admit::Admission,
    core::SinceServing,
    gate::Gate,
    permit::{Permit, Reading, Unanswered},
    shard::Refused,
    thread_index::thread_index,
    word::Word,
};
