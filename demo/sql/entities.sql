-- Rows to learn from: a fixed sample of the labels, without the weeks in which the trailing windows fill up.
-- The draw depends on the household and the time since the data began, and so not on the re-basing.

WITH candidates AS (
    SELECT user_id, event_timestamp, label, epoch(event_timestamp)::BIGINT AS request_timestamp,
           epoch(event_timestamp - min(event_timestamp) OVER ())::BIGINT AS elapsed
    FROM read_parquet($labels)
)
SELECT user_id, event_timestamp, request_timestamp, label
FROM (
    SELECT * FROM candidates
    WHERE elapsed >= 35 * 86400
    ORDER BY md5(user_id || '/' || elapsed)
    LIMIT $rows
)
ORDER BY event_timestamp, user_id;
