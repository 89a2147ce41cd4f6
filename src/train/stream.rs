//! A set of images that stays on the host: batches go to the device ahead of their steps, through two buffers.
//!
//! The device holds two batches, and step k reads half k mod 2. A thread per half gathers its next batch from the set as soon as the
//! last one has been sent, and the copy runs beside the step before:
//!
//! ```text
//! thread 0   gather k          gather k+2
//! thread 1            gather k+1           gather k+3
//! copies              send k   send k+1      send k+2
//! steps                        step k        step k+1
//! ```
//!
//! Which images a batch holds depends on the seed and its place alone, so a step computes the same bits as with the whole set on
//! the device; only the indices it is given are others.

use crate::config::Config;
use crate::data::{Batches, Dataset};
use crate::device::Device;
use crate::device::host::{HostBuffer, Mark};
use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Batches that the device holds.
const HALVES: usize = 2;

/// Images that the device holds when they are streamed.
pub(super) fn images(config: &Config) -> usize {
    HALVES * config.train.batch_size
}

/// A buffer on its way to a thread and back.
struct Job {
    indices: Vec<u32>,
    pixels: HostBuffer,
    /// The copy that still reads the buffer.
    sent: Mark,
}

/// One half of the device's images.
struct Half {
    orders: Sender<Job>,
    filled: Receiver<Result<Job>>,
    /// The end of the last step that reads it.
    read: Mark,
}

/// See the module.
pub(super) struct Stream {
    set: Arc<Dataset>,
    halves: Vec<Half>,
    /// The walk through the set, as many batches ahead as there are halves.
    ahead: Batches,
    /// The half of the next step, and of the step being started.
    next: usize,
    current: usize,
}

impl Stream {
    /// Two buffers and their threads, at the place of `batches`.
    pub(super) fn new(device: &Device, set: Dataset, batches: Batches) -> Result<Self> {
        let set = Arc::new(set);
        let mut stream = Stream { set: set.clone(), halves: Vec::new(), ahead: batches, next: 0, current: 0 };
        for i in 0..HALVES {
            let ((orders, jobs), (done, filled)) = (channel::<Job>(), channel());
            let images = set.clone();
            let work = move || {
                for job in jobs {
                    let answer = gather(&images, job);
                    let failed = answer.is_err();
                    // The stream is gone when nobody takes the answer.
                    if done.send(answer).is_err() || failed {
                        break;
                    }
                }
            };
            let thread = std::thread::Builder::new().name(format!("iddpm-images-{i}")).spawn(work);
            thread.map_err(|e| Error::Device(format!("cannot start a thread that gathers images: {e}")))?;
            let pixels = device.host(stream.ahead.batch * set.image_len())?;
            stream.halves.push(Half { orders, filled, read: Mark::default() });
            stream.order(i, Job { indices: Vec::new(), pixels, sent: Mark::default() })?;
        }
        Ok(stream)
    }

    /// Lets the thread of `half` gather the next batch.
    fn order(&mut self, half: usize, mut job: Job) -> Result<()> {
        job.indices.clear();
        job.indices.extend_from_slice(self.ahead.next());
        self.halves[half].orders.send(job).map_err(|_| ended())
    }

    fn filled(&self, half: usize) -> Result<Job> {
        self.halves[half].filled.recv().map_err(|_| ended())?
    }

    /// Sends the images `indices`, the next batch; returns where on the device the first one lies. The next run waits for them.
    pub(super) fn send(&mut self, device: &mut Device, indices: &[u32]) -> Result<u32> {
        let (half, batch) = (self.next, indices.len());
        let mut job = self.filled(half)?;
        assert_eq!(job.indices, indices, "the batches ahead are those of the run");
        let read = std::mem::take(&mut self.halves[half].read);
        job.sent = device.write_data_aside(half * job.pixels.len(), &job.pixels, &read)?;
        device.hold_for(&job.sent)?;
        self.order(half, job)?;
        (self.current, self.next) = (half, (half + 1) % HALVES);
        Ok((half * batch) as u32)
    }

    /// The step that reads the images sent last has been started.
    pub(super) fn started(&mut self, device: &Device) -> Result<()> {
        self.halves[self.current].read = device.mark()?;
        Ok(())
    }

    /// Sends the images `indices` to the place `first` of the device and waits, when nothing is in flight.
    pub(super) fn send_again(&mut self, device: &mut Device, indices: &[u32], first: u32) -> Result<()> {
        let mut pixels = device.host(indices.len() * self.set.image_len())?;
        self.set.gather(indices, &mut pixels);
        device.write_data_aside(first as usize * self.set.image_len(), &pixels, &Mark::default())?.wait()
    }

    /// Goes to the place after `position` images.
    pub(super) fn seek(&mut self, position: u64) -> Result<()> {
        let jobs: Vec<Job> = (0..HALVES).map(|half| self.filled(half)).collect::<Result<_>>()?;
        self.ahead.position = position;
        self.next = 0;
        jobs.into_iter().enumerate().try_for_each(|(half, job)| self.order(half, job))
    }
}

/// After its device has failed.
fn ended() -> Error {
    Error::Device("the images can no longer be sent: the device failed before".into())
}

/// Fills the buffer of `job` once the copy that reads it has ended.
fn gather(set: &Dataset, mut job: Job) -> Result<Job> {
    job.sent.wait()?;
    set.gather(&job.indices, &mut job.pixels);
    Ok(job)
}
