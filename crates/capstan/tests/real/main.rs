//! Real processes on real sockets: what a user gets, proved. One binary, because linking it takes longer than a test.
mod absent;
mod cables;
mod chaos;
mod cluster;
mod concurrency;
mod daemons;
mod exactness;
mod leaks;
mod measuring;
mod openai_client;
mod pipeline;
mod prefix;
mod rehearse;
mod speculation;
mod weights;
