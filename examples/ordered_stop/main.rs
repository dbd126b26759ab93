//! A service that stops in order: HTTP first, then the workers with their queue, then the database,
//! then the logs. Every accepted job is in the database when the process ends, unless the database does not
//! accept them within `worker_timeout`; the exit code is 1 then.
//!
//! ```sh
//! cargo run --example ordered_stop                      # or: -- 127.0.0.1:3000 jobs.db
//! curl -i localhost:3000/jobs -d 'write to Ada'         # 202: accepted
//! kill -TERM $(pgrep -x ordered_stop)                   # or Ctrl-C, without the delay
//! cat /tmp/ordered_stop.*.log                           # ends with the report
//! ```

use std::{env, error::Error, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use axum::{Router, extract::State, http::StatusCode, routing::post};
use sqlx::{
    SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::sync::{Mutex, mpsc};
use tower_graceful::{Graceful, Stop};

type Jobs = mpsc::Sender<String>;

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let address = args.next().unwrap_or_else(|| "127.0.0.1:3000".into());
    let database = args
        .next()
        .map_or_else(|| env::temp_dir().join("jobs.db"), PathBuf::from);

    // Before everything else, so that a signal while the database opens is an orderly stop.
    let graceful = Graceful::builder()
        .grace_period(Duration::from_secs(30)) // terminationGracePeriodSeconds
        .drain_timeout(Duration::from_secs(12))
        .worker_timeout(Duration::from_secs(8))
        .cleanup_timeout(Duration::from_secs(10))
        .name_requests(true)
        .build()?;
    graceful.handle_signals()?;

    // Logs go through a buffer, which a separate thread writes to the file.
    let name = format!("ordered_stop.{}.log", std::process::id());
    let file = tracing_appender::rolling::never(env::temp_dir(), name);
    let (file, flushed_when_dropped) = tracing_appender::non_blocking(file);
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(file)
        .init();

    let options = SqliteConnectOptions::new()
        .filename(database)
        .create_if_missing(true)
        // The database stays consistent even if the process is killed.
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal)
        .busy_timeout(Duration::from_secs(1));
    let pool = SqlitePool::connect_with(options).await?;
    sqlx::query("CREATE TABLE IF NOT EXISTS jobs (job TEXT NOT NULL)")
        .execute(&pool)
        .await?;

    // Two workers share the queue. The queue ends when its last sender is dropped. The router holds
    // the senders, and is dropped when HTTP has drained. The stop waits for the workers after that.
    let (jobs, queue) = mpsc::channel(100);
    let queue = Arc::new(Mutex::new(queue));
    for name in ["writer 1", "writer 2"] {
        let (queue, pool) = (Arc::clone(&queue), pool.clone());
        graceful.worker(name, |_stop| write(queue, pool))?;
    }
    // This worker has no queue. Its `Stop` tells it when to end.
    let counted = pool.clone();
    graceful.worker("counter", |stop| count(stop, counted))?;

    // Cleanup steps run in this order, after the workers have ended.
    graceful.cleanup("database", Duration::from_secs(5), async move {
        pool.close().await;
    })?;

    let app = Router::new()
        .route("/jobs", post(accept))
        .with_state(jobs)
        .layer(graceful.layer());
    let app = graceful.probes().merge(app);
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    let report = graceful.serve(listener, app).await;

    tracing::info!("{report}");
    println!("{report}");
    drop(flushed_when_dropped); // the last step, because all other code may log
    Ok(report.into())
}

/// Accepts a job. After the 202 the service is responsible for it.
async fn accept(State(jobs): State<Jobs>, job: String) -> StatusCode {
    match jobs.try_send(job) {
        Ok(()) => StatusCode::ACCEPTED,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE, // the queue is full
    }
}

/// Stores jobs until the queue has ended. Tries again if a job cannot be stored, because the job was
/// accepted.
async fn write(queue: Arc<Mutex<mpsc::Receiver<String>>>, pool: SqlitePool) {
    loop {
        let job = queue.lock().await.recv().await;
        let Some(job) = job else { return };
        let insert = || sqlx::query("INSERT INTO jobs VALUES (?)").bind(&job);
        while let Err(error) = insert().execute(&pool).await {
            tracing::warn!(%error, job, "not stored yet");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Logs the number of jobs at intervals.
async fn count(mut stop: Stop, pool: SqlitePool) {
    let mut often = tokio::time::interval(Duration::from_secs(10));
    loop {
        tokio::select! {
            () = &mut stop => return,
            _ = often.tick() => {
                match sqlx::query_scalar::<_, i64>("SELECT count(*) FROM jobs").fetch_one(&pool).await {
                    Ok(count) => tracing::info!(count, "jobs"),
                    Err(error) => tracing::warn!(%error, "not counted"),
                }
            }
        }
    }
}
