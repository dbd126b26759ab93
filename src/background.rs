//! Threads for code that does not belong to this crate: log subscribers, wakers, and destructors of
//! user values.
//!
//! Such code may block or panic, and no thread of the shutdown waits for it, with one exception: if the
//! operating system cannot start a thread for wakers and destructors, the caller runs them. `control`
//! and `events` queue jobs here. A job runs on a thread that exists only while there are jobs. If jobs
//! must keep their order, there is one thread. Otherwise another thread takes over when a job takes
//! too long.
//!
//! 1. *A job is never left without a thread.* The queue and the number of threads are behind one
//!    lock. A thread that finds the queue empty ends in the same critical section. Code that queues
//!    a job afterwards sees that there is no thread, and starts one. Model:
//!    `a_job_is_never_left_without_a_thread`. It fails if a thread releases the lock between finding
//!    the queue empty and ending.
//! 2. *A panic ends its job and nothing else.*

use std::{
    any::Any,
    collections::VecDeque,
    mem,
    panic::{self, AssertUnwindSafe},
    process, thread,
    time::{Duration, Instant},
};

use crate::sync::{Condvar, Mutex, lock};

/// How long a job may take before another thread takes over the queue. Long enough for a job that
/// does not block, and short beside every deadline of a shutdown.
const STUCK: Duration = Duration::from_millis(20);

pub(crate) type Job = Box<dyn FnOnce() + Send>;

pub(crate) struct JobThreads {
    name: &'static str,
    most_threads: usize,
    queue: Mutex<Queue>,
    emptied: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    /// The process that the threads belong to. A forked child has no threads.
    process: u32,
    /// When the last job was taken.
    taken: Option<Instant>,
}

/// Runs foreign code and catches its panic.
pub(crate) fn shielded(code: impl FnOnce()) {
    if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(code)) {
        drop_payload(payload);
    }
}

/// Drops values whose destructors are foreign code, one by one. A destructor that panics while the panic of another one
/// unwinds would end the process.
pub(crate) fn drop_each<T>(values: impl IntoIterator<Item = T>) {
    for value in values {
        shielded(|| drop(value));
    }
}

/// Drops the payload of a panic. Its destructor is foreign code too, and may panic. Then the payload of that
/// panic is leaked.
pub(crate) fn drop_payload(payload: Box<dyn Any + Send>) {
    if let Err(second) = panic::catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        mem::forget(second);
    }
}

impl JobThreads {
    pub(crate) fn new(name: &'static str, most_threads: usize) -> Self {
        Self {
            name,
            most_threads,
            queue: Mutex::new(Queue::default()),
            emptied: Condvar::new(),
        }
    }

    /// Queues a job. The caller calls [`work`](Self::work) afterwards.
    pub(crate) fn queue(&self, job: Job) {
        lock!(self.queue).jobs.push_back(job);
    }

    /// Starts a thread for the jobs in the queue, if one is needed.
    pub(crate) fn work(&'static self) {
        if !self.claim() {
            return;
        }
        let thread = thread::Builder::new().name(self.name.to_owned());
        if thread.spawn(|| self.drain()).is_ok() {
            return;
        }
        if self.most_threads == 1 {
            // The jobs are log events. They wait: the next call tries again to start a thread.
            self.end_thread(&mut lock!(self.queue));
        } else {
            self.drain();
        }
    }

    pub(crate) fn has_jobs(&self) -> bool {
        !lock!(self.queue).jobs.is_empty()
    }

    /// As [`work`](Self::work), for a thread that supervises the queue. Returns when to call again.
    pub(crate) fn relieve(&'static self) -> Option<Instant> {
        if !self.has_jobs() {
            return None;
        }
        self.work();
        Some(Instant::now() + STUCK)
    }

    /// Counts one more thread if one is needed.
    fn claim(&self) -> bool {
        let mut queue = lock!(self.queue);
        let process = process::id();
        if queue.process != process {
            queue.process = process;
            queue.threads = 0;
        }
        let needed = !queue.jobs.is_empty()
            && (queue.threads == 0 || queue.threads < self.most_threads && queue.is_stuck());
        if needed {
            queue.threads += 1;
            // The new thread also gets `STUCK` for its first job.
            queue.taken = Some(Instant::now());
        }
        needed
    }

    fn drain(&self) {
        let mut queue = lock!(self.queue);
        while let Some(job) = queue.jobs.pop_front() {
            queue.taken = Some(Instant::now());
            drop(queue);
            shielded(job);
            queue = lock!(self.queue);
        }
        self.end_thread(&mut queue);
    }

    fn end_thread(&self, queue: &mut Queue) {
        queue.threads -= 1;
        if queue.threads == 0 {
            self.emptied.notify_all();
        }
    }

    /// Waits until every job is done, at most for `within`.
    #[cfg(any(feature = "tracing", test))]
    pub(crate) fn flush(&self, within: Duration) {
        let until = Instant::now() + within;
        let mut queue = lock!(self.queue);
        while !queue.jobs.is_empty() || queue.threads > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = match self.emptied.wait_timeout(queue, left) {
                Ok((queue, _)) => queue,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Queue {
    fn is_stuck(&self) -> bool {
        self.taken.is_none_or(|taken| taken.elapsed() >= STUCK)
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use std::sync::Arc;

    use loom::{
        model,
        sync::atomic::{AtomicUsize, Ordering},
        thread,
    };

    use super::*;

    /// Point 1 of the module header, for a queue with one thread.
    #[test]
    fn a_job_is_never_left_without_a_thread() {
        model(|| {
            let threads = Arc::new(JobThreads::new("model", 1));
            let done = Arc::new(AtomicUsize::new(0));
            let queue = |threads: &Arc<JobThreads>, done: &Arc<AtomicUsize>| {
                let done = Arc::clone(done);
                threads.queue(Box::new(move || {
                    done.fetch_add(1, Ordering::Relaxed);
                }));
                if threads.claim() {
                    threads.drain();
                }
            };
            let other = {
                let (threads, done) = (Arc::clone(&threads), Arc::clone(&done));
                thread::spawn(move || queue(&threads, &done))
            };
            queue(&threads, &done);
            other.join().unwrap();
            assert_eq!(done.load(Ordering::Relaxed), 2);
            assert_eq!(lock!(threads.queue).threads, 0);
        });
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn threads(most_threads: usize) -> &'static JobThreads {
        Box::leak(Box::new(JobThreads::new("test-jobs", most_threads)))
    }

    fn run(threads: &'static JobThreads, job: impl FnOnce() + Send + 'static) {
        threads.queue(Box::new(job));
        threads.work();
    }

    #[test]
    fn jobs_of_one_thread_keep_their_order_and_a_panic_ends_one_of_them() {
        let threads = threads(1);
        let (send, done) = mpsc::channel();
        for n in 0..100 {
            let send = send.clone();
            run(threads, move || {
                send.send(n).unwrap();
                if n % 10 == 0 {
                    panic::resume_unwind(Box::new("as the test wants it to"));
                }
            });
        }
        drop(send);
        assert!(done.iter().eq(0..100));
        threads.flush(Duration::from_secs(10));
        assert_eq!(lock!(threads.queue).threads, 0, "no thread is left");
    }

    #[test]
    fn a_job_that_blocks_delays_no_other() {
        let threads = threads(4);
        let (release, blocked) = mpsc::channel::<()>();
        run(threads, move || {
            let _ = blocked.recv();
        });
        let (send, done) = mpsc::channel();
        run(threads, move || send.send(()).unwrap());
        let deadline = Instant::now() + Duration::from_secs(10);
        let now = Instant::now;
        while let (before, Some(look)) = (now(), threads.relieve()) {
            assert!(before < deadline, "no other thread takes the job");
            assert!(look >= before + STUCK);
            thread::sleep(look.saturating_duration_since(Instant::now()));
        }
        done.recv_timeout(Duration::from_secs(10)).unwrap();
        drop(release);
        threads.flush(Duration::from_secs(10));
        assert_eq!(lock!(threads.queue).threads, 0, "no thread is left");
    }

    /// Whether one more thread is needed for a job, with so many threads in this state.
    fn needs_thread(most_threads: usize, state: Queue) -> bool {
        let before = state.threads;
        let threads = JobThreads::new("test-jobs", most_threads);
        *lock!(threads.queue) = state;
        threads.queue(Box::new(|| ()));
        let needed = threads.claim();
        let queue = lock!(threads.queue);
        assert_eq!(queue.process, process::id());
        if needed && before == 0 {
            assert_eq!(queue.threads, 1);
        }
        needed
    }

    #[test]
    fn another_thread_is_needed_only_where_one_takes_too_long_and_more_may_be_started() {
        let later = Instant::now() + Duration::from_secs(3600);
        for (most_threads, threads, taken, needed) in [
            (1, 0, Some(later), true),
            (1, 1, None, false),
            (2, 1, None, true),
            (2, 1, Some(later), false),
            (2, 2, None, false),
        ] {
            let state = Queue {
                threads,
                process: process::id(),
                taken,
                ..Queue::default()
            };
            let case = format!("{threads} of {most_threads} threads, {taken:?}");
            assert_eq!(needs_thread(most_threads, state), needed, "{case}");
        }
    }

    #[test]
    fn a_forked_child_starts_a_thread_of_its_own() {
        let of_the_parent = Queue {
            threads: 1,
            process: process::id() + 1,
            taken: Some(Instant::now() + Duration::from_secs(3600)),
            ..Queue::default()
        };
        assert!(needs_thread(1, of_the_parent));
    }

    #[test]
    fn a_flush_waits_for_the_job_that_runs() {
        let threads = threads(1);
        let (begun, runs) = mpsc::channel();
        let (release, blocked) = mpsc::channel::<()>();
        run(threads, move || {
            begun.send(()).unwrap();
            let _ = blocked.recv();
        });
        runs.recv_timeout(Duration::from_secs(10)).unwrap();
        drop(release);
        threads.flush(Duration::from_secs(10));
        assert_eq!(lock!(threads.queue).threads, 0, "a thread is left");
    }

    #[test]
    fn waiting_for_a_job_that_blocks_has_an_end() {
        let threads = threads(1);
        let (release, blocked) = mpsc::channel::<()>();
        run(threads, move || {
            let _ = blocked.recv();
        });
        threads.flush(Duration::from_millis(10));
        drop(release);
    }
}

/// Wakers of the kinds that this module guards against.
#[cfg(all(test, not(tower_graceful_loom)))]
pub(crate) mod wakers {
    use std::{
        panic::resume_unwind,
        sync::{
            Arc, Mutex,
            mpsc::{self, Receiver, Sender},
        },
        task::{Wake, Waker},
    };

    struct Panics;

    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            resume_unwind(Box::new("as the test wants it to"));
        }
    }

    pub(crate) fn panicking() -> Waker {
        Waker::from(Arc::new(Panics))
    }

    struct Blocks(Mutex<Receiver<()>>, Sender<()>);

    impl Wake for Blocks {
        fn wake(self: Arc<Self>) {
            self.1.send(()).unwrap();
            let _ = self.0.lock().unwrap().recv();
        }
    }

    /// A waker that blocks until the sender is dropped. The receiver tells when it is woken.
    pub(crate) fn blocking() -> (Waker, Receiver<()>, Sender<()>) {
        let (release, blocked) = mpsc::channel();
        let (woken, is_woken) = mpsc::channel();
        let blocks = Blocks(blocked.into(), woken);
        (Waker::from(Arc::new(blocks)), is_woken, release)
    }
}
